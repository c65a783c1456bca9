"""Captions as the model reads them, and the choice of a caption or class for each image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.conditions.tensor_files import arrays_from_npz
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.spec import ModelSpec

MASKED = -10_000.0  # added to the attention scores of padding, as in PixArt's reference
PROMPT, PROMPT_MASK = "prompt_embeds", "prompt_attention_mask"  # diffusers' argument names
NEGATIVE, NEGATIVE_MASK = "negative_prompt_embeds", "negative_prompt_attention_mask"
NAMES = (PROMPT, PROMPT_MASK, NEGATIVE, NEGATIVE_MASK)
NO_CAPTIONS = (
    "the engine directory keeps no captions to take instead of class labels; export with `captions`"
)


@dataclass(frozen=True, slots=True, eq=False)
class Captions:
    """K captions, padded to the length that the model reads.

    Attributes:
        embeds: (K, L, C) float32.
        mask: (K, L) float32: 1 for a token, 0 for padding.
    """

    embeds: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def bias(self) -> np.ndarray:
        """(K, L) float32, the number to add to attention scores."""
        return ((1 - self.mask) * MASKED).astype(np.float32)


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
        return Captions(
            np.concatenate([self.prompts.embeds, self.negatives.embeds]),
            np.concatenate([self.prompts.mask, self.negatives.mask]),
        )


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
            raise UsageError(f"guidance needs {NEGATIVE} too; add them, or use `cfg_scale=1`")
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
    first, rows, embeds, masks = 0, list[np.ndarray](), [], []
    for part, table in zip(parts, tables, strict=True):
        read, index = np.unique([part.labels, part.nulls], return_inverse=True)
        rows.append(first + index.reshape(2, -1))
        embeds.append(table.embeds[read])
        masks.append(table.mask[read])
        first += len(read)
    own, unconditional = np.concatenate(rows, axis=1).tolist()
    captions = Captions(np.concatenate(embeds), np.concatenate(masks))
    return Conditions(tuple(own), tuple(unconditional), captions)


def prompt_embeds_from_arrays(
    arrays: Mapping[str, np.ndarray], spec: ModelSpec, where: str
) -> PromptEmbeds:
    """Check and pad prompt embeddings.

    Args:
        arrays: ``prompt_embeds`` [K, L, C], and optionally ``prompt_attention_mask`` [K, L],
            ``negative_prompt_embeds`` [K or 1, L, C] and ``negative_prompt_attention_mask``.
        spec: the model.
        where: source of the arrays for messages.

    Raises:
        UsageError: a name is unknown, or a shape, dtype or value does not fit.
    """
    if not spec.text_conditional:
        raise UsageError(
            f"{where}: this is a class-conditional model, which takes no captions; use `labels`"
        )
    unknown = sorted(arrays.keys() - set(NAMES))
    if unknown or PROMPT not in arrays or (NEGATIVE_MASK in arrays and NEGATIVE not in arrays):
        has = f"it has {', '.join(sorted(arrays)) or 'nothing'}"
        raise UsageError(f"{where} must hold {PROMPT}, and may hold {', '.join(NAMES[1:])}; {has}")
    prompts = _captions(arrays, PROMPT, PROMPT_MASK, spec, where)
    negatives = (
        _captions(arrays, NEGATIVE, NEGATIVE_MASK, spec, where) if NEGATIVE in arrays else None
    )
    if negatives is not None and len(negatives) not in (1, len(prompts)):
        raise UsageError(
            f"{where} has {len(negatives)} negative captions for {len(prompts)}; give one, or one "
            "for each"
        )
    return PromptEmbeds(prompts, negatives)


def _captions(
    arrays: Mapping[str, np.ndarray], name: str, mask_name: str, spec: ModelSpec, where: str
) -> Captions:
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
    )


def blank_captions(spec: ModelSpec) -> PromptEmbeds:
    """Make one caption of zeros, for runs whose images do not matter."""
    blank = Captions(
        np.zeros((1, spec.caption_tokens, spec.caption_channels), np.float32),
        np.ones((1, spec.caption_tokens), np.float32),
    )
    return PromptEmbeds(blank, blank)


def captions_to_bytes(embeds: PromptEmbeds) -> bytes:
    """Write the ``.npz`` file of an engine directory; it has one negative caption."""
    assert embeds.negatives is not None
    file = io.BytesIO()
    np.savez(
        file,
        prompt_embeds=embeds.prompts.embeds,
        prompt_attention_mask=embeds.prompts.mask,
        negative_prompt_embeds=embeds.negatives.embeds[:1],
        negative_prompt_attention_mask=embeds.negatives.mask[:1],
    )
    return file.getvalue()


def captions_from_bytes(content: memoryview, spec: ModelSpec, where: str) -> PromptEmbeds:
    """Read a file that `captions_to_bytes` wrote.

    Raises:
        EngineDirError: the content is another, or the number of captions is not that of the spec.
    """
    try:
        embeds = prompt_embeds_from_arrays(arrays_from_npz(io.BytesIO(content), where), spec, where)
    except UsageError as cause:
        raise EngineDirError(
            f"{where} holds no captions for this model ({cause}); export again"
        ) from cause
    if (
        len(embeds.prompts) != spec.choices
        or embeds.negatives is None
        or len(embeds.negatives) != 1
    ):
        raise EngineDirError(
            f"{where} holds {len(embeds.prompts)} captions, not {spec.choices}; export again"
        )
    return embeds


def check_rows(labels: Sequence[int], count: int) -> None:
    """Raise UsageError unless all labels are whole numbers within 0..count - 1."""
    for i, label in enumerate(labels):
        whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not whole or not 0 <= label < count:
            raise UsageError(
                f"label {label!r} (image {i}) must be a whole number within 0..{count - 1}"
            )
