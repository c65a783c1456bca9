"""Class labels as people write them: numbers, or names that the model's folder gave."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from goc_deploy.conditions.captions import NO_CAPTIONS
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


LABELS = 2**64 - 1  # in place of an image index


def balanced_labels(classes: int, images: int, seed: int) -> tuple[int, ...]:
    """Labels of calibration images: every class equally often (to one), in an order that the seed shuffles.

    Raises:
        UsageError: there are none: a model that draws captions, in an engine directory that keeps none.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, LABELS], np.uint64)))
    if not classes:
        raise UsageError(NO_CAPTIONS)
    rounds = [generator.permutation(classes) for _ in range(-(-images // classes))]
    return tuple(int(label) for label in np.concatenate(rounds)[:images])


def spread_labels(labels: Sequence[int] | None, count: int | None, classes: int) -> list[int]:
    """Labels of ``count`` images: the given ones (or 0, 1, 2, ...), repeated in order. Without a count once each, or 8.

    Raises:
        UsageError: none are given and there are no classes to take.
    """
    if labels is None and not classes:
        raise UsageError(f"{NO_CAPTIONS}, or give prompt embeddings")
    source = list(labels) if labels is not None else list(range(min(classes, count or 8)))
    return [source[i % len(source)] for i in range(count or len(source))]


def grid_columns(labels: Sequence[int]) -> int | None:
    """Columns of a grid in which a row is a repetition of the labels, or several, or None where that is no good shape."""
    period = next(
        p
        for p in range(1, len(labels) + 1)
        if all(labels[i] == labels[i - p] for i in range(p, len(labels)))
    )
    if not (1 < period <= 24 and 2 * period <= len(labels)):
        return None
    return period * max(1, round(math.sqrt(len(labels)) / period))
