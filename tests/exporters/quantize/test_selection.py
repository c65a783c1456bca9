from __future__ import annotations

import pytest

from goc_deploy.errors import UsageError
from goc_deploy.exporters.quantize.selection import quantized_units

UNITS = tuple(f"block_{block:02d}_{branch}" for block in range(4) for branch in ("attn", "mlp"))


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ((), UNITS),
        (("first",), UNITS[2:]),
        (("last:2",), UNITS[:4]),
        (("first", "last"), UNITS[2:6]),
        (("block_01",), UNITS[:2] + UNITS[4:]),
        (("*_mlp",), UNITS[::2]),
        (("block_0[0-2]",), UNITS[6:]),
        (("block_03_attn", "first:3"), UNITS[7:]),
        (("first:9",), ()),
        (("*",), ()),
    ],
)
def test_patterns_exclude_units(patterns: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert quantized_units(UNITS, patterns) == kept


@pytest.mark.parametrize("pattern", ["block_04", "final", "first:0", "First", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"matches none of the units block_00_attn to block_03_ml"):
        quantized_units(UNITS, (pattern,))
