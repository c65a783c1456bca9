"""Checks of the arguments of `goc_deploy.runtime.pipeline.Pipeline.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.conditions.captions import (
    Conditions,
    PromptEmbeds,
    conditions_from_captions,
    conditions_from_labels,
)
from goc_deploy.conditions.latent_arrays import array_of_latents, float32_of_latents
from goc_deploy.errors import UsageError
from goc_deploy.guidance import EMBEDDED_GUIDANCE, SkipLayerGuidance, cfg_scale_of, skip_window
from goc_deploy.runtime.noise import check_key
from goc_deploy.spec import ModelSpec

MAX_SCALE = 1e3


def is_whole(value: object) -> bool:
    """Whether a value is an integer of Python or NumPy; a bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_labels(labels: Any) -> None:
    """Check that labels are a list or an array; `conditions` checks each label.

    Raises:
        UsageError: labels are a single label, a text, or an array whose rank is not one.
    """
    if (
        isinstance(labels, str | bytes)
        or not hasattr(labels, "__len__")
        or getattr(labels, "ndim", 1) != 1
    ):
        raise UsageError(
            f"labels are a list of whole numbers, got {labels!r:.60}; for one image give a list of "
            "one"
        )


def conditions(
    labels: Sequence[int] | None,
    captions: PromptEmbeds | None,
    spec: ModelSpec,
    stored: PromptEmbeds | None,
    *,
    guided: bool,
) -> Conditions:
    """The conditions of each image.

    Args:
        labels: class labels, or indices of captions; None selects each caption once.
        captions: prompt embeddings; None selects the stored captions.
        spec: sizes of the model.
        stored: the stored captions of the engine directory, or None.
        guided: whether any image is guided.

    Raises:
        UsageError: labels are not a list or out of range, or captions are for a class-conditional
            model.
    """
    if labels is not None:
        check_labels(labels)
    if captions is None:
        return conditions_from_labels(() if labels is None else labels, spec, stored)
    if not spec.text_conditional:
        raise UsageError("this model draws class labels, not captions; give labels")
    return conditions_from_captions(labels, captions, guided=guided)


def checked_seed(seed: Any) -> int | list[int]:
    """Convert a seed, or a sequence or array of seeds.

    Raises:
        UsageError: a seed is not a whole number.
    """
    seeds = _numbers(seed)
    for value in seeds if isinstance(seeds, list) else [seeds]:
        if not is_whole(value):
            raise UsageError(
                f"seed must be a whole number, or a list of one per image, got {value!r:.60}"
            )
    return [int(value) for value in seeds] if isinstance(seeds, list) else int(seeds)


def checked_scale(cfg_scale: Any, name: str = "cfg_scale") -> float | list[float]:
    """Convert a guidance scale, or a sequence or array of scales.

    Args:
        cfg_scale: one scale, or one per image.
        name: what errors call it.

    Raises:
        UsageError: a scale is not a number within 0..1000.
    """
    scales = _numbers(cfg_scale)
    for value in scales if isinstance(scales, list) else [scales]:
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(
            value, bool
        )
        if not number or not 0 <= value <= MAX_SCALE:
            raise UsageError(
                f"{name} must be a number within 0..{MAX_SCALE:g}, or a list of one per image, "
                f"got {value!r:.60}"
            )
    return [float(value) for value in scales] if isinstance(scales, list) else float(scales)


def check_channels(cfg_channels: Any) -> None:
    """Check the number of guided channels.

    Raises:
        UsageError: the number is negative or not a whole number.
    """
    if not is_whole(cfg_channels) or cfg_channels < 0:
        raise UsageError(
            f"cfg_channels must be a whole number and not negative, got {cfg_channels!r:.60}"
        )


def guidance(
    cfg_scale: Any, cfg_channels: Any, spec: ModelSpec, cfg_scale_2: float | None = None
) -> tuple[float | list[float], int, bool]:
    """Check the guidance of a call.

    Args:
        cfg_scale: one scale, or one per image; None is the default of the model.
        cfg_channels: number of guided channels; None is that of the model's reference.
        spec: the model.
        cfg_scale_2: what `second_scale` returned.

    Returns:
        The scale or scales, the number of channels, and whether any image is guided.

    Raises:
        UsageError: one of them is out of range.
    """
    scales = checked_scale(cfg_scale_of(cfg_scale, spec))
    channels = spec.guided_channels if cfg_channels is None else cfg_channels
    check_channels(channels)
    of_sets = [*np.atleast_1d(scales), *([] if cfg_scale_2 is None else [cfg_scale_2])]
    return scales, int(channels), bool(np.any(np.not_equal(of_sets, 1))) and channels != 0


def second_scale(cfg_scale_2: Any, spec: ModelSpec) -> float | None:
    """Check the guidance scale of the second set of weights; None is the scale of the first.

    Raises:
        UsageError: the scale is not a number within 0..1000, or the model has one set.
    """
    if cfg_scale_2 is None:
        return None
    if not spec.boundary:
        raise UsageError(
            "`cfg_scale_2` is for models with two sets of weights, such as Wan 2.2 A14B, and this "
            "model has one; use `cfg_scale`"
        )
    return _checked_number(cfg_scale_2, "cfg_scale_2")


def embedded_guidance(guidance: Any, spec: ModelSpec) -> float:
    """The guidance scale that the conditioning of a call reads; other models do not read it.

    Args:
        guidance: the scale that the caller gave; None is `EMBEDDED_GUIDANCE`.
        spec: the model.

    Raises:
        UsageError: the scale is not a number within 0..1000, or the model embeds none.
    """
    if guidance is None:
        return EMBEDDED_GUIDANCE
    if not spec.embedded_guidance:
        raise UsageError(
            "`guidance` is for models that embed a guidance scale, such as FLUX.1-dev, and this "
            "model does not; use `cfg_scale`"
        )
    return _checked_number(guidance, "guidance")


def skip_guidance(
    given: Any, spec: ModelSpec, plan: Plan, *, guided: bool
) -> SkipLayerGuidance | None:
    """Check the skip-layer guidance of a call; None is none.

    Args:
        given: its scale, or its scale, start and stop.
        spec: the model.
        plan: the plan, which decides how many steps there are.
        guided: whether any image is guided.

    Raises:
        UsageError: the engine directory has no rows for it, no image is guided, the plan has a
            head, a number is out of range, or there is no step between start and stop.
    """
    if given is None:
        return None
    if not spec.skip_guidance_layers:
        raise UsageError(
            "`skip_layer_guidance` needs rows of the model without some blocks, which the engine "
            "directory does not have; export it with `skip_guidance_layers`"
        )
    if not guided:
        raise UsageError(
            "`skip_layer_guidance` adds to the guidance of an image, and no image is guided; give "
            "a `cfg_scale` other than 1, or leave it out"
        )
    if plan.sampler.head is not None:
        raise UsageError(
            f"plan {plan.name} has a head, which was fitted without skip-layer guidance; use a "
            "plan without a head, or leave out `skip_layer_guidance`"
        )
    numbers = _numbers(given)
    parts = skip_window(tuple(numbers) if isinstance(numbers, list) else numbers)
    if len(parts) != 3:
        raise UsageError(
            "skip_layer_guidance must be a scale, or a scale, a start and a stop, got "
            f"{given!r:.60}"
        )
    scale, start, stop = (_checked_number(part, "skip_layer_guidance") for part in parts)
    steps = [step for step in range(plan.steps) if start * plan.steps < step < stop * plan.steps]
    if not steps:
        raise UsageError(
            f"skip_layer_guidance acts in no step, because none of {plan.steps} is after "
            f"{start * plan.steps:g} and before {stop * plan.steps:g}; give an earlier start or a "
            "later stop, as shares of the steps"
        )
    return SkipLayerGuidance(scale, range(steps[0], steps[-1] + 1))


def _checked_number(scale: Any, name: str) -> float:
    """Convert a scale that all images share."""
    number = checked_scale(scale, name)
    if isinstance(number, list):
        raise UsageError(f"{name} must be one number for all images; call once for each number")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that an argument is one of a few words.

    Raises:
        UsageError: it is not.
    """
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r:.60}")


def noise_keys(seed: int | list[int], first_image: Any, images: int) -> list[tuple[int, int]]:
    """The seed and the index of each image, which determine its noise.

    Args:
        seed: one seed, for indices ``first_image``, ``first_image + 1`` and so on; or one seed per
            image, each with the index ``first_image``, as in a request of one image.
        first_image: index of the first image.
        images: N.

    Raises:
        UsageError: the number of seeds is not N, or a seed or an index is out of range.
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
        UsageError: the number of scales is not the number of images.
    """
    if isinstance(cfg_scale, list):
        return np.array(_one_per_image("cfg_scale", cfg_scale, images))
    return np.full(images, cfg_scale)


def checked_latents(latents: Any, expected: tuple[int, ...]) -> np.ndarray:
    """Convert x_T of a request to float32.

    Args:
        latents: the argument.
        expected: shape, (N, C, H, W), or (N, C, F, H, W) of videos.

    Raises:
        UsageError: latents are not an array, have another shape, are whole numbers, or do not fit
            into float32.
    """
    values = array_of_latents(latents, "latents are")
    if values.shape != expected:
        raise UsageError(
            f"latents have shape {list(values.shape)}, expected {list(expected)} for "
            f"{expected[0]} labels"
        )
    if values.dtype.kind != "f":
        raise UsageError(f"latents have dtype {values.dtype}, expected float32")
    return float32_of_latents(values, "latents hold")


def _numbers(argument: Any) -> Any:
    """The list of a sequence or of an array of rank one; any other argument unchanged."""
    if isinstance(argument, Sequence) and not isinstance(argument, str | bytes):
        return list(argument)
    is_row = isinstance(argument, np.ndarray) and argument.ndim == 1
    return list(argument) if is_row else argument


def _one_per_image(name: str, values: list[Any], images: int) -> list[Any]:
    if len(values) != images:
        raise UsageError(
            f"{name} is a list of {len(values)} for {images} images; give one number, or one for "
            "each image"
        )
    return values
