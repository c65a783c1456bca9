"""What `goc_deploy.runtime.pipeline.Pipeline.generate` is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from goc_deploy.conditions.captions import (
    Conditions,
    PromptEmbeds,
    conditions_from_captions,
    conditions_from_labels,
)
from goc_deploy.errors import UsageError
from goc_deploy.runtime.noise import check_key
from goc_deploy.spec import ModelSpec

MAX_SCALE = 1e3


def is_whole(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_labels(labels: Any) -> None:
    """Check that labels can be counted; each is checked where they are used.

    Raises:
        UsageError: one label instead of a list, a text, or an array of another rank than one.
    """
    if (
        isinstance(labels, str | bytes)
        or not hasattr(labels, "__len__")
        or getattr(labels, "ndim", 1) != 1
    ):
        raise UsageError(
            f"labels are a list of whole numbers, got {labels!r:.60}; for one image give a list of one"
        )


def conditions(
    labels: Sequence[int] | None,
    captions: PromptEmbeds | None,
    spec: ModelSpec,
    stored: PromptEmbeds | None,
    *,
    guided: bool,
) -> Conditions:
    """What each image shows.

    Args:
        labels: class labels, or which of the captions; None is each of them once.
        captions: embeddings; None is what the engine directory keeps.
        spec: the model.
        stored: the captions that the engine directory keeps.
        guided: whether any image is guided.

    Raises:
        UsageError: labels that are no list or out of range, or captions for a model that draws
            classes.
    """
    if labels is not None:
        check_labels(labels)
    if captions is None:
        return conditions_from_labels(() if labels is None else labels, spec, stored)
    if not spec.draws_captions:
        raise UsageError("this model draws class labels, not captions; give labels")
    return conditions_from_captions(labels, captions, guided=guided)


def checked_seed(seed: Any) -> int | list[int]:
    """A seed, or a list of them from any sequence or array.

    Raises:
        UsageError: something that is not a whole number.
    """
    found = _numbers(seed)
    for value in found if isinstance(found, list) else [found]:
        if not is_whole(value):
            raise UsageError(
                f"seed must be a whole number, or a list of one per image, got {value!r:.60}"
            )
    return [int(value) for value in found] if isinstance(found, list) else int(found)


def checked_scale(cfg_scale: Any) -> float | list[float]:
    """A guidance scale, or a list of them from any sequence or array.

    Raises:
        UsageError: something that is not a number within 0..1000.
    """
    found = _numbers(cfg_scale)
    for value in found if isinstance(found, list) else [found]:
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(
            value, bool
        )
        if not number or not 0 <= value <= MAX_SCALE:
            raise UsageError(
                f"cfg_scale must be a number within 0..{MAX_SCALE:g}, or a list of one per image, got {value!r:.60}"
            )
    return [float(value) for value in found] if isinstance(found, list) else float(found)


def check_channels(cfg_channels: Any) -> None:
    """Check how many channels are guided.

    Raises:
        UsageError: something that is not a whole number, or a negative one.
    """
    if not is_whole(cfg_channels) or cfg_channels < 0:
        raise UsageError(
            f"cfg_channels must be a whole number and not negative, got {cfg_channels!r:.60}"
        )


def noise_keys(seed: int | list[int], first_image: Any, images: int) -> list[tuple[int, int]]:
    """Seed and index of each image, which its noise is made from.

    Args:
        seed: one for all, whose images are ``first_image``, ``first_image + 1`` and so on; or one per image, each of which is
            ``first_image`` of its own seed, as in a request of one image.
        first_image: where the request starts.
        images: N.

    Raises:
        UsageError: another number of seeds, or a word that is out of range.
    """
    if not is_whole(first_image) or first_image < 0:
        raise UsageError(
            f"first_image must be a whole number and not negative, got {first_image!r:.60}"
        )
    first = int(first_image)
    if isinstance(seed, int):
        if first + images > 2**64:
            raise UsageError(
                f"first_image {first} leaves less than {images} images up to 2**64; start earlier"
            )
        keys = [(seed, first + i) for i in range(images)]
    else:
        keys = [(of_image, first) for of_image in _one_per_image("seed", seed, images)]
    for key in keys:
        check_key(*key)
    return keys


def scale_of_each(cfg_scale: float | list[float], images: int) -> np.ndarray:
    """The guidance scale of each image, (N,) float64.

    Raises:
        UsageError: another number of scales than images.
    """
    if isinstance(cfg_scale, list):
        return np.array(_one_per_image("cfg_scale", cfg_scale, images))
    return np.full(images, cfg_scale)


def checked_latents(latents: Any, images: int, spec: ModelSpec) -> np.ndarray:
    """x_T of a request, (N, C, H, W) float32.

    Raises:
        UsageError: no array, another shape, whole numbers, or values that float32 cannot hold.
    """
    expected = (images, spec.channels, spec.side, spec.side)
    try:
        found = np.asarray(latents)
    except Exception as cause:  # whatever an object raises that is asked to be an array
        raise UsageError(
            f"latents are no array: {cause}; for a tensor of torch use latents.detach().float().numpy()"
        ) from cause
    if found.shape != expected:
        raise UsageError(
            f"latents have shape {list(found.shape)}, expected {list(expected)} for {images} labels"
        )
    if found.dtype.kind != "f":
        raise UsageError(f"latents have dtype {found.dtype}, expected float32")
    with np.errstate(over="ignore"):
        narrow = found.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise UsageError("latents hold NaN or infinite values, or such that float32 cannot hold")
    return narrow


def _numbers(given: Any) -> Any:
    """The values of a sequence or of an array of rank one; anything else as it is."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return list(given)
    return list(given) if isinstance(given, np.ndarray) and given.ndim == 1 else given


def _one_per_image(name: str, values: list[Any], images: int) -> list[Any]:
    if len(values) != images:
        raise UsageError(
            f"{name} is a list of {len(values)} for {images} images; give one number, or one for each image"
        )
    return values
