from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler.cache_ops import (
    predict_signature,
    update_from_name,
    update_name,
    updates_from_signature,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.schedule import MAX_HISTORY

updates = st.tuples(st.integers(1, MAX_HISTORY), st.booleans())


@given(updates)
def test_the_name_of_an_update_says_what_it_reads_and_stores(update: tuple[int, bool]) -> None:
    assert update_from_name(update_name(update[0], stores=update[1])) == update


def test_op_types_are_those_of_the_files() -> None:
    assert update_name(3, stores=True) == "GocCacheUpdate3"
    assert update_name(1, stores=False) == "GocCacheApply1"
    for other in (f"GocCacheUpdate{MAX_HISTORY + 1}", "GocCacheApply0", "GocCacheStack", "Add"):
        assert update_from_name(other) is None


@given(st.lists(updates, min_size=1, max_size=20))
def test_a_signature_says_what_every_unit_reads_and_stores(units: list[tuple[int, bool]]) -> None:
    assert updates_from_signature(predict_signature(units)) == units


@pytest.mark.parametrize(
    "signature",
    ["", "2w", "2w*0", "5*1", "0*1", "2x*3", "1*2  2*1", "2w*8 ", "2W*1", "2w*01"],
)
def test_what_is_no_signature_is_refused(signature: str) -> None:
    with pytest.raises(EngineDirError, match="is not a predict signature; each run must read"):
        updates_from_signature(signature)
