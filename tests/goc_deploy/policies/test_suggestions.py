from __future__ import annotations

import pytest

from goc_deploy.policies.suggestions import closest, meant_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("fora:4", "fora:4"),
        ("fora-4", "fora:4"),
        ("fora-2+gc-1.2", "fora:2+gc:1.2"),
        ("none", "none"),
        ("smoothcache-0.3+fit", "smoothcache:0.3+fit"),
        ("other", None),
        ("fora:2+other", None),
        ("fora:2+gc+gc", None),
        ("fora-2+lagrange-2+head-patch", "fora:2+lagrange:2+head:patch"),
    ],
)
def test_a_plan_name_is_understood_as_the_spec_that_it_comes_from(
    text: str, spec: str | None
) -> None:
    assert meant_spec(text) == spec


def test_the_most_similar_name_is_found() -> None:
    assert closest("fsat", ["slow", "fast"]) == "fast"
    assert closest("zzz", ["slow", "fast"]) is None
