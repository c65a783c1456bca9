from __future__ import annotations

import pytest

from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.quantize.selection import checked_formats, patterns_of, quantized_units
from goc_deploy.precision import WeightFormat

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


MANY = tuple(f"block_{block:02d}_attn" for block in range(12))


@pytest.mark.parametrize(
    ("given", "formats", "family", "units", "used"),
    [
        ((), ("int8",), "wan", MANY, ("first:3", "last:3")),
        ((), ("fp8",), "qwen-image", MANY, ("first:2", "last:2")),
        ((), ("fp8",), "qwen-image-edit", MANY, ("first:2", "last:2")),
        ((), ("int8+smooth",), "dit", MANY, ()),
        ((), ("w8",), "wan", MANY, ()),
        ((), (), "wan", MANY, ()),
        ((), ("w8", "int8"), "wan", MANY, ("first:3", "last:3")),
        ((), ("int8",), "wan", MANY[:11], ()),
        (("first",), ("int8",), "wan", MANY, ("first",)),
        (("none",), ("int8",), "wan", MANY, ()),
    ],
)
def test_sensitive_ends_of_large_models_are_left_out_by_default(
    given: tuple[str, ...],
    formats: tuple[WeightFormat, ...],
    family: str,
    units: tuple[str, ...],
    used: tuple[str, ...],
) -> None:
    assert patterns_of(given, formats, ARCHITECTURES[family].sensitive, units) == used


def test_none_with_other_patterns_is_refused() -> None:
    with pytest.raises(UsageError, match="excludes nothing, so it goes with no other pattern"):
        patterns_of(("none", "first"), ("int8",), (), UNITS)


def test_every_format_counts_once() -> None:
    assert checked_formats(("w4", "w8", "w4"), (), bounded=True) == ("w4", "w8")
    assert checked_formats(("w8", "w8"), (), bounded=False) == ("w8",)
    assert checked_formats((), (), bounded=False) == ()


def test_several_formats_without_a_bound_are_refused() -> None:
    with pytest.raises(UsageError, match="formats w4 and w8, between which `max_error` decides"):
        checked_formats(("w4", "w8"), (), bounded=False)
