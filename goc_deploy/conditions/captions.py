"""Captions as the model reads them, and the choice of a caption or class for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import UsageError
from goc_deploy.spec import ModelSpec

SHOWN_NAMES = 8  # of a file that is something else
MASKED = -10_000.0  # added to the attention scores of padding, as in PixArt's reference
# diffusers' argument names of the embeddings, the mask and the pooled embeddings:
PROMPT = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
NEGATIVE = (
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
    "negative_pooled_prompt_embeds",
)
NO_CAPTIONS = (
    "the engine directory keeps no captions to take instead of class labels; export with `captions`"
)


@dataclass(frozen=True, slots=True, eq=False)
class Captions:
    """K captions, padded to the length that the model reads.

    Attributes:
        embeds: (K, L, C) float32.
        mask: (K, L) float32: 1 for a token, 0 for padding.
        pooled: (K, P) float32, one vector for each whole caption; P is 0 if the model reads none.
    """

    embeds: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def bias(self) -> np.ndarray:
        """(K, L) float32, the number to add to attention scores."""
        return ((1 - self.mask) * MASKED).astype(np.float32)

    def chosen(self, rows: np.ndarray | slice) -> Captions:
        """Some of the captions."""
        return Captions(self.embeds[rows], self.mask[rows], self.pooled[rows])


def joined_captions(parts: Sequence[Captions]) -> Captions:
    """Captions of one model, one after the other."""
    return Captions(
        np.concatenate([part.embeds for part in parts]),
        np.concatenate([part.mask for part in parts]),
        np.concatenate([part.pooled for part in parts]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeds:
    """Prompts of images, and negative prompts for guidance.

    Attributes:
        prompts: K captions.
        negatives: K captions, or one for all prompts; None makes guidance impossible.
    """

    prompts: Captions
    negatives: Captions | None

    @property
    def table(self) -> Captions:
        """Prompts, followed by negatives."""
        if self.negatives is None:
            return self.prompts
        return joined_captions((self.prompts, self.negatives))


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What each of N images shows.

    Attributes:
        labels: N class labels, or rows of ``captions``.
        nulls: the same for the unconditional half; without guidance they are not read.
        captions: the table of these rows, or None for a class-conditional model.
    """

    labels: tuple[int, ...]
    nulls: tuple[int, ...]
    captions: Captions | None = None

    def part(self, images: range) -> Conditions:
        """Select the conditions of some of the images."""
        cut = slice(images.start, images.stop)
        return Conditions(self.labels[cut], self.nulls[cut], self.captions)


def conditions_from_labels(
    labels: Sequence[int], spec: ModelSpec, stored: PromptEmbeds | None
) -> Conditions:
    """Make conditions of labels: classes, or stored captions of an engine directory.

    Raises:
        UsageError: there are no labels, or one is out of range.
    """
    if len(labels) == 0:
        raise UsageError("labels are empty; give one label per image")
    if spec.text_conditional and stored is None:
        raise UsageError(f"{NO_CAPTIONS}, or give prompts")
    check_rows(labels, spec.choices)
    table = None if stored is None else stored.table
    return Conditions(tuple(int(label) for label in labels), (spec.choices,) * len(labels), table)


def conditions_from_captions(
    labels: Sequence[int] | None, embeds: PromptEmbeds, *, guided: bool
) -> Conditions:
    """Make conditions of captions; ``labels`` are rows of the prompts, None is each row once.

    Raises:
        UsageError: a row is out of range, or guidance has no negatives.
    """
    count = len(embeds.prompts)
    rows = tuple(range(count)) if labels is None else tuple(labels)
    check_rows(rows, count)
    if embeds.negatives is None:
        if guided:
            raise UsageError(f"guidance needs {NEGATIVE[0]} too; add them, or use `cfg_scale=1`")
        return Conditions(rows, rows, embeds.prompts)
    negatives = len(embeds.negatives)
    return Conditions(rows, tuple(count + row % negatives for row in rows), embeds.table)


def joined_conditions(parts: Sequence[Conditions]) -> Conditions:
    """Join the conditions of several calls; captions that no image reads are left out."""
    labels = tuple(label for part in parts for label in part.labels)
    nulls = tuple(null for part in parts for null in part.nulls)
    tables = [part.captions for part in parts if part.captions is not None]
    if not tables:
        return Conditions(labels, nulls)
    assert len(tables) == len(parts)
    first, rows, chosen = 0, list[np.ndarray](), list[Captions]()
    for part, table in zip(parts, tables, strict=True):
        read, index = np.unique([part.labels, part.nulls], return_inverse=True)
        rows.append(first + index.reshape(2, -1))
        chosen.append(table.chosen(read))
        first += len(read)
    own, unconditional = np.concatenate(rows, axis=1).tolist()
    return Conditions(tuple(own), tuple(unconditional), joined_captions(chosen))


def prompt_embeds_from_arrays(
    arrays: Mapping[str, np.ndarray], spec: ModelSpec, where: str
) -> PromptEmbeds:
    """Check and pad prompt embeddings.

    Args:
        arrays: ``prompt_embeds`` [K, L, C], and optionally ``prompt_attention_mask`` [K, L],
            ``negative_prompt_embeds`` [K or 1, L, C] and ``negative_prompt_attention_mask``. If the
            model reads pooled embeddings, also ``pooled_prompt_embeds`` [K, P], and
            ``negative_pooled_prompt_embeds`` [K or 1, P] if there are negatives.
        spec: the model.
        where: source of the arrays for messages.

    Raises:
        UsageError: a name is unknown, or a shape, dtype or value does not fit.
    """
    if not spec.text_conditional:
        raise UsageError(
            f"{where}: this is a class-conditional model, which takes no captions; use `labels`"
        )
    _check_names(arrays, spec, where)
    prompts = _captions(arrays, PROMPT, spec, where)
    negatives = _captions(arrays, NEGATIVE, spec, where) if NEGATIVE[0] in arrays else None
    if negatives is not None and len(negatives) not in (1, len(prompts)):
        raise UsageError(
            f"{where} has {len(negatives)} negative captions for {len(prompts)}; give one, or one "
            "for each"
        )
    return PromptEmbeds(prompts, negatives)


def _check_names(arrays: Mapping[str, np.ndarray], spec: ModelSpec, where: str) -> None:
    """Refuse arrays that are missing or unknown."""
    needed = PROMPT[::2] if spec.pooled_channels else PROMPT[:1]
    known = (*PROMPT, *NEGATIVE) if spec.pooled_channels else (*PROMPT[:2], *NEGATIVE[:2])
    if not set(needed) <= arrays.keys() <= set(known) or (
        NEGATIVE[0] not in arrays and arrays.keys() & set(NEGATIVE)
    ):
        optional = [name for name in known if name not in needed]
        shown, more = sorted(arrays)[:SHOWN_NAMES], max(0, len(arrays) - SHOWN_NAMES)
        raise UsageError(
            f"{where} must hold {' and '.join(needed)}, and may hold {', '.join(optional)}; "
            f"it has {', '.join(shown) or 'nothing'}{f' and {more} more' if more else ''}"
        )
    if spec.pooled_channels and NEGATIVE[0] in arrays and NEGATIVE[2] not in arrays:
        raise UsageError(
            f"{where} has {NEGATIVE[0]} but no {NEGATIVE[2]}, which the model reads too; add it"
        )


def _captions(
    arrays: Mapping[str, np.ndarray], names: tuple[str, str, str], spec: ModelSpec, where: str
) -> Captions:
    name, mask_name, pooled_name = names
    embeds = np.asarray(arrays[name])
    if embeds.ndim != 3 or 0 in embeds.shape or embeds.dtype.kind != "f":
        raise UsageError(
            f"{where}: {name} is {embeds.dtype} {list(embeds.shape)}, expected floating point "
            "[N,L,C]"
        )
    count, tokens, width = embeds.shape
    if width != spec.caption_channels:
        raise UsageError(
            f"{where}: {name} has embeddings of width {width} but the model takes "
            f"{spec.caption_channels}; use its own text encoder"
        )
    if tokens > spec.caption_tokens:
        raise UsageError(
            f"{where}: {name} has {tokens} tokens but the model takes {spec.caption_tokens}; "
            "encode with that limit"
        )
    if not np.isfinite(embeds).all():
        raise UsageError(f"{where}: {name} holds NaN or infinite values")
    mask = np.asarray(arrays.get(mask_name, np.ones((count, tokens))))
    if (
        mask.shape != (count, tokens)
        or not np.isin(mask, (0, 1)).all()
        or not mask.any(axis=1).all()
    ):
        raise UsageError(
            f"{where}: {mask_name} must be {[count, tokens]} of zeros and ones with a one for each "
            f"caption, got {list(mask.shape)}"
        )
    missing = spec.caption_tokens - tokens
    return Captions(
        np.pad(embeds.astype(np.float32), ((0, 0), (0, missing), (0, 0))),
        np.pad(mask.astype(np.float32), ((0, 0), (0, missing))),
        _pooled(arrays, pooled_name, count, spec, where),
    )


def _pooled(
    arrays: Mapping[str, np.ndarray], name: str, count: int, spec: ModelSpec, where: str
) -> np.ndarray:
    """The pooled embeddings of captions, (count, P) float32."""
    if not spec.pooled_channels:
        return np.zeros((count, 0), np.float32)
    pooled, expected = np.asarray(arrays[name]), (count, spec.pooled_channels)
    if pooled.shape != expected or pooled.dtype.kind != "f":
        raise UsageError(
            f"{where}: {name} is {pooled.dtype} {list(pooled.shape)}, expected floating point "
            f"{list(expected)}: one vector for each caption, from the text encoders of the model"
        )
    if not np.isfinite(pooled).all():
        raise UsageError(f"{where}: {name} holds NaN or infinite values")
    return pooled.astype(np.float32)


def blank_captions(spec: ModelSpec) -> PromptEmbeds:
    """Make one caption of zeros, for runs whose images do not matter."""
    blank = Captions(
        np.zeros((1, spec.caption_tokens, spec.caption_channels), np.float32),
        np.ones((1, spec.caption_tokens), np.float32),
        np.zeros((1, spec.pooled_channels), np.float32),
    )
    return PromptEmbeds(blank, blank)


def check_rows(labels: Sequence[int], count: int) -> None:
    """Raise UsageError unless all labels are whole numbers within 0..count - 1."""
    for i, label in enumerate(labels):
        whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not whole or not 0 <= label < count:
            raise UsageError(
                f"label {label!r} (image {i}) must be a whole number within 0..{count - 1}"
            )
