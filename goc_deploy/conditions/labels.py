"""Labels as users write them: numbers, or class names from the model's folder."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from goc_deploy.conditions.captions import NO_CAPTIONS
from goc_deploy.errors import UsageError


def labels_from_text(text: str, class_names: Sequence[str]) -> tuple[int, ...]:
    """Parse labels that are separated by commas.

    Args:
        text: labels such as ``golden retriever,207``; upper and lower case are the same.
        class_names: one per class, with synonyms separated by commas; empty if the model has none.

    Raises:
        UsageError: a word is neither a whole number nor the name of exactly one class.
    """
    labels_of: dict[str, list[int]] = {}
    for label, synonyms in enumerate(class_names):
        for name in synonyms.split(","):
            labels_of.setdefault(_key(name), []).append(label)
    return tuple(_label(word, labels_of) for word in text.split(","))


def _label(word: str, labels_of: dict[str, list[int]]) -> int:
    if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", word):
        return int(word)
    labels = sorted(set(labels_of.get(_key(word), ())))
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise UsageError(
            f"{word.strip()!r} is the name of the classes {' and '.join(map(str, labels))}; give "
            "the number"
        )
    hint = (
        "is not the name of a class"
        if labels_of
        else "must be a whole number, the model has no class names"
    )
    raise UsageError(f"label {word.strip()!r} {hint}; separate labels by commas")


def _key(name: str) -> str:
    return " ".join(name.lower().split())


LABELS = 2**64 - 1  # this number in place of an image index is the stream of labels


def balanced_labels(classes: int, images: int, seed: int) -> tuple[int, ...]:
    """Choose the labels of calibration images.

    Every class occurs equally often (to within one), in an order that the seed shuffles.

    Raises:
        UsageError: the model is text-conditional and the engine directory has no captions.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, LABELS], np.uint64)))
    if not classes:
        raise UsageError(NO_CAPTIONS)
    rounds = [generator.permutation(classes) for _ in range(-(-images // classes))]
    return tuple(int(label) for label in np.concatenate(rounds)[:images])


def spread_labels(labels: Sequence[int] | None, count: int | None, classes: int) -> list[int]:
    """Return the labels of ``count`` images: the given ones, or 0, 1, 2, ..., repeated in order.

    Without a count, every given label occurs once; without labels too, there are 8 images.

    Raises:
        UsageError: there are neither labels nor classes.
    """
    if labels is None and not classes:
        raise UsageError(f"{NO_CAPTIONS}, or give prompt embeddings")
    source = list(labels) if labels is not None else list(range(min(classes, count or 8)))
    return [source[i % len(source)] for i in range(count or len(source))]


def grid_columns(labels: Sequence[int]) -> int | None:
    """Return the number of columns of a grid whose rows repeat the labels.

    A row may hold several repetitions. The result is None if no such grid has a good shape.
    """
    period = next(
        p
        for p in range(1, len(labels) + 1)
        if all(labels[i] == labels[i - p] for i in range(p, len(labels)))
    )
    if not (1 < period <= 24 and 2 * period <= len(labels)):
        return None
    return period * max(1, round(math.sqrt(len(labels)) / period))
