"""Which units keep their precision: the grammar of ``--quantize-exclude``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from goc_deploy.errors import UsageError
from goc_deploy.precision import CALIBRATED_FORMATS, WEIGHT_FORMATS, Precision, WeightFormat

NOTHING = "none"  # the pattern that excludes nothing, also not by default

_ENDS = re.compile(r"(first|last)(?::([1-9][0-9]{0,3}))?")
_BLOCK = re.compile(r"block_[0-9]+")


def checked_formats(
    quantize: Sequence[WeightFormat], patterns: Sequence[str], *, bounded: bool
) -> tuple[WeightFormat, ...]:
    """Return the formats that units may have, each once.

    Args:
        quantize: the formats; none quantises nothing.
        patterns: as for `quantized_units`.
        bounded: whether one of several formats is chosen for each unit.

    Raises:
        UsageError: a format is unknown, there are several without a bound, or patterns without one.
    """
    if patterns and not quantize:
        raise UsageError("`quantize_exclude` needs `quantize`, which says what to quantise to")
    for wanted in quantize:
        if wanted not in WEIGHT_FORMATS:
            raise UsageError(
                f"`quantize={wanted!s:.60}` is unknown; it is one of {', '.join(WEIGHT_FORMATS)}"
            )
    formats = tuple(dict.fromkeys(quantize))
    if len(formats) > 1 and not bounded:
        raise UsageError(
            f"`quantize` has the formats {' and '.join(formats)}, between which `max_error` "
            "decides; add it, or give one format"
        )
    return formats


def patterns_of(
    given: Sequence[str],
    formats: Sequence[WeightFormat],
    sensitive: tuple[str, ...],
    units: Sequence[str],
) -> tuple[str, ...]:
    """Return the patterns that are used: the given ones, or the default of a family.

    A default that would exclude more than half of the blocks of a small model is not used.

    Args:
        given: patterns that the user gave; ``none`` alone is no pattern.
        formats: the formats; without a calibrated one there are no defaults.
        sensitive: the default, `Architecture.sensitive`.
        units: as for `quantized_units`.

    Raises:
        UsageError: ``none`` is given with other patterns.
    """
    if NOTHING in given and len(given) > 1:
        raise UsageError(
            f"`quantize_exclude={NOTHING}` excludes nothing, so it goes with no other pattern"
        )
    if given:
        return () if NOTHING in given else tuple(given)
    patterns = sensitive if {*formats} & {*CALIBRATED_FORMATS} else ()
    left = {block_of(unit) for unit in quantized_units(units, patterns)}
    return patterns if 2 * len(left) >= len({block_of(unit) for unit in units}) else ()


def check_calibrated(
    formats: Sequence[WeightFormat], precision: Precision, *, choices: int
) -> None:
    """Check that the formats that are calibrated can be.

    Args:
        formats: formats of quantised units.
        precision: precision of the engine directory.
        choices: number of labels or captions that calibration images can have.

    Raises:
        UsageError: the CPU has no kernels for the precision, or there are no captions.
    """
    for wanted in set(formats) & set(CALIBRATED_FORMATS):
        if precision == "bf16":
            raise UsageError(
                f"`quantize={wanted}` is calibrated on images, but the CPU has no kernels for "
                "bf16; use `precision=fp32` or fp16"
            )
        if not choices:
            raise UsageError(
                f"`quantize={wanted}` is calibrated on images, but there are no captions; add "
                "`captions`"
            )


def quantized_units(units: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the units that no pattern excludes, in order.

    A pattern is one of

    * ``first`` or ``last``, the first or last block, and ``first:N`` or ``last:N``, N blocks;
    * the name of a unit or of a block, in which ``*``, ``?`` and ``[...]`` match as in a shell:
      ``block_03_mlp``, ``block_03``, ``*_attn``, ``block_0[0-2]``.

    Args:
        units: names of the units of all blocks, in the order of a step.
        patterns: the patterns.

    Raises:
        UsageError: a pattern matches no unit.
    """
    blocks = [block_of(unit) for unit in units]
    order = list(dict.fromkeys(blocks))
    excluded: set[str] = set()
    for pattern in patterns:
        ends = _ENDS.fullmatch(pattern)
        count = int(ends[2] or 1) if ends else 0
        matched = (
            order[:count]
            if ends and ends[1] == "first"
            else order[-count:]
            if ends
            else [name for name in (*order, *units) if fnmatchcase(name, pattern)]
        )
        if not matched:
            raise UsageError(
                f"`quantize_exclude={pattern:.60}` matches none of the units {units[0]} to "
                f"{units[-1]}; give first, last, first:N, last:N, none, or a pattern such as "
                "block_00, block_03_mlp or *_attn"
            )
        excluded.update(matched)
    return tuple(
        unit for unit, block in zip(units, blocks, strict=True) if not {unit, block} & excluded
    )


def block_of(unit: str) -> str:
    """``block_03`` of ``block_03_mlp``."""
    match = _BLOCK.match(unit)
    return match[0] if match else unit
