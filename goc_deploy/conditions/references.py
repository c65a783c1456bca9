"""The latents of reference images, which a model that edits images reads beside the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from goc_deploy.conditions.latent_arrays import array_of_latents, float32_of_latents
from goc_deploy.errors import UsageError
from goc_deploy.spec import ModelSpec

NAME = "reference_latents"  # in a file; further images have this name with _2, _3 and so on


def references_from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> tuple[np.ndarray, ...]:
    """The latents of each reference image in a file, in order.

    Args:
        arrays: the arrays of the file, by name.
        where: the file, for messages.

    Raises:
        UsageError: an array has another name, or one before it is missing.
    """
    names = [NAME, *(f"{NAME}_{i}" for i in range(2, len(arrays) + 1))]
    if set(names) != arrays.keys():
        names_given = ", ".join(sorted(arrays)) or "nothing"
        raise UsageError(
            f"{where} must hold {NAME} [N,C,H,W], and of further images {NAME}_2, {NAME}_3 and so "
            f"on; it has {names_given:.200}"
        )
    return tuple(arrays[name] for name in names)


def checked_references(given: Any, images: int, spec: ModelSpec) -> tuple[np.ndarray, ...]:
    """Convert the latents of the reference images of a request.

    Args:
        given: an array (N, C, H, W), or a sequence of them, one per reference image; None if there
            are none. One row instead of N is for all images.
        images: N, the number of images to draw.
        spec: sizes of the model.

    Returns:
        (N, C, H, W) float32 of each reference image; empty if the model reads none.

    Raises:
        UsageError: the model reads none, or needs them; there are more than the engine directory
            accepts; or one is not an array of finite numbers of a possible shape.
    """
    if not spec.max_references:
        if given is not None:
            raise UsageError(
                "`reference_latents` are for models that edit images, such as Qwen-Image-Edit, and "
                "this model does not; leave them out"
            )
        return ()
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    references = list(given) if several else [] if given is None else [given]
    if not references:
        raise UsageError(
            "the model edits images; give `reference_latents`, the latents [N,C,H,W] of the image "
            "to edit, from the encoder of its VAE"
        )
    if len(references) > spec.max_references:
        raise UsageError(
            f"`reference_latents` are of {len(references)} images, more than the "
            f"{spec.max_references} that the engine directory accepts; export with a larger "
            "`max_references`"
        )
    return tuple(_checked(values, images, spec) for values in references)


def _checked(values: Any, images: int, spec: ModelSpec) -> np.ndarray:
    """The latents of one reference image, (N, C, H, W) float32."""
    latents = array_of_latents(values, "`reference_latents` is")
    shape, patch = list(latents.shape), spec.patch
    if latents.ndim != 4 or latents.dtype.kind != "f" or shape[0] not in (1, images):
        rows = "1" if images == 1 else f"1 or {images}"
        raise UsageError(
            f"`reference_latents` is {latents.dtype} {shape}, expected floating point [N,C,H,W] "
            f"with {rows} for N, because {images} images are drawn"
        )
    _, channels, height, width = shape
    if channels != spec.channels:
        raise UsageError(
            f"`reference_latents` has shape {shape}, but latents of this model have "
            f"{spec.channels} channels; encode the image with the VAE of the model"
        )
    if not height or not width or height % patch or width % patch:
        raise UsageError(
            f"`reference_latents` has shape {shape}, but {patch} must divide height and width; "
            "resize the image before it is encoded"
        )
    rows_and_columns, most = spec.axes_of((channels, height, width)), spec.largest
    tokens = rows_and_columns[0] * rows_and_columns[1]
    if tokens > most.tokens:
        raise UsageError(
            f"`reference_latents` has shape {shape} and so {tokens} tokens, more than the "
            f"{most.tokens} of the largest image; resize the image before it is encoded, or export "
            "with a larger `max_size`"
        )
    narrow = float32_of_latents(latents, "`reference_latents` holds")
    return np.broadcast_to(narrow, (images, *narrow.shape[1:]))


def blank_references(images: int, spec: ModelSpec) -> tuple[np.ndarray, ...]:
    """Latents of zeros, of the usual sizes, for runs whose images do not matter."""
    patch = spec.patch
    return tuple(
        np.zeros((images, spec.channels, rows * patch, columns * patch), np.float32)
        for rows, columns in spec.reference_axes
    )


def patches_of(references: Sequence[np.ndarray], spec: ModelSpec) -> np.ndarray:
    """The patches of all reference images, row by row and image after image.

    Args:
        references: (N, C, H, W) of each image.
        spec: sizes of the model.

    Returns:
        (N, R, C * patch * patch) float32.
    """
    by_patches = (
        latents.reshape(spec.in_patches(latents.shape)).transpose(0, 2, 4, 1, 3, 5)
        for latents in references
    )  # (N, h, w, C, p, p) each
    return np.concatenate(
        [values.reshape(len(values), -1, spec.patch_values) for values in by_patches], axis=1
    )
