"""Class labels as people write them: numbers, or names that the model's folder gave."""

from __future__ import annotations

import re
from collections.abc import Sequence

from goc_deploy.errors import UsageError


def labels_from_text(text: str, class_names: Sequence[str]) -> tuple[int, ...]:
    """Labels from words separated by commas.

    Args:
        text: such as ``golden retriever,207``; upper and lower case are the same.
        class_names: one per class, synonyms separated by commas; empty where the model has none.

    Raises:
        UsageError: a word that is neither a whole number nor the name of exactly one class.
    """
    known: dict[str, list[int]] = {}
    for label, synonyms in enumerate(class_names):
        for name in synonyms.split(","):
            known.setdefault(_key(name), []).append(label)
    return tuple(_label(word, known) for word in text.split(","))


def _label(word: str, known: dict[str, list[int]]) -> int:
    if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", word):
        return int(word)
    found = sorted(set(known.get(_key(word), ())))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{word.strip()!r} is the name of the classes {' and '.join(map(str, found))}; give the number"
        )
    hint = (
        "is not the name of a class"
        if known
        else "must be a whole number, the model has no class names"
    )
    raise UsageError(f"label {word.strip()!r} {hint}; separate labels by commas")


def _key(name: str) -> str:
    return " ".join(name.lower().split())
