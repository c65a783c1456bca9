"""Outputs that a document shows: a block of language ``text`` right after the commands.

<!-- numbers vary: REASON -->    before such a block: only its words are compared
"""

from __future__ import annotations

import math
import re

VARY = re.compile(r"<!-- numbers vary: (?P<reason>\S.*) -->")
PROGRESS = re.compile(
    r": \d+ of \d+(, .* left)?$"
)  # of a bar where there is no terminal; it depends on time
BORDERS = re.compile(r"[\u2500-\u257f]+")
NUMBER = re.compile(r"(?<![\w.])[+-]*\d[\d,]*(?:\.\d+)*(?:e[+-]\d+)?")
RELATIVE, ABSOLUTE = 0.05, 0.015  # of rounding errors that calibration amplifies


def words_and_numbers(text: str) -> tuple[list[str], list[float | str]]:
    """The words of an output with ``#`` for every number, and the numbers; tables lose borders."""
    lines = [line for line in text.splitlines() if not PROGRESS.search(line)]
    plain = BORDERS.sub(" ", "\n".join(lines))
    numbers = [_value(found.group()) for found in NUMBER.finditer(plain)]
    return NUMBER.sub("#", plain).split(), numbers


def same_output(shown: str, found: str, vary: bool) -> bool:
    """Whether a command printed what the document shows."""
    (words, numbers), (found_words, found_numbers) = map(words_and_numbers, (shown, found))
    if words != found_words:
        return False
    return vary or all(
        a == b
        if isinstance(a, str) or isinstance(b, str)
        else math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        for a, b in zip(numbers, found_numbers, strict=True)
    )


def _value(text: str) -> float | str:
    try:
        return float(text.lstrip("+").replace(",", ""))
    except ValueError:  # a version
        return text
