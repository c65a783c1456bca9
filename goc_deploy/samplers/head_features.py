"""The features of a head in NumPy, as the fit and the interpreter use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from goc_deploy.samplers.head import Head, HeadForm
from goc_deploy.spec import ModelSpec

NORM_EPSILON = 1e-6


def head_weights(head: Head) -> np.ndarray:
    """The weights W, (T, F, P) float32, as a read-only view."""
    return np.frombuffer(head.weights, "<f4").reshape(head.shape)


def normalized(tokens: np.ndarray) -> np.ndarray:
    """Tokens (..., D) with mean 0 and variance 1, float32: a layer norm without weights."""
    wide = tokens.astype(np.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    variance = np.square(centered).mean(-1, keepdims=True)
    return np.asarray(centered / np.sqrt(variance + np.float32(NORM_EPSILON)))


def cells_from_latents(latents: np.ndarray, form: HeadForm, spec: ModelSpec) -> np.ndarray:
    """Latents (N, C, H, W) as cells (N, cells, P).

    A cell of ``scalar`` is one value. Any other cell is a token's patch, in the order (row of the
    patch, column of the patch, channel).
    """
    images = len(latents)
    if form.features == "scalar":
        return latents.reshape(images, -1, 1)
    rows, columns = spec.axes
    split = latents.reshape(images, spec.channels, rows, spec.patch, columns, spec.patch)
    return split.transpose(0, 2, 4, 3, 5, 1).reshape(images, spec.tokens, -1)


def latents_from_cells(cells: np.ndarray, form: HeadForm, spec: ModelSpec) -> np.ndarray:
    """The inverse of `cells_from_latents`."""
    shape = (len(cells), *spec.latents)
    if form.features == "scalar":
        return cells.reshape(shape)
    rows, columns = spec.axes
    split = cells.reshape(-1, rows, columns, spec.patch, spec.patch, spec.channels)
    return split.transpose(0, 5, 1, 3, 2, 4).reshape(shape)


def head_features(
    form: HeadForm,
    spec: ModelSpec,
    latents: np.ndarray,
    outputs: Sequence[tuple[np.ndarray, np.ndarray]],
    tokens: Sequence[tuple[np.ndarray, np.ndarray]],
    scales: np.ndarray,
) -> np.ndarray:
    """The features z of a step, (N, cells, F) float32.

    Args:
        form: what the head reads.
        spec: sizes of the model.
        latents: (N, C, H, W) before the step.
        outputs: (conditional, unconditional) model outputs (N, C, H, W), without variance channels:
            of this step, then of earlier computed steps, newest first. Those that are missing at
            the start count as zeros.
        tokens: the same for `normalized` tokens (N, tokens, D) before the final layer; empty unless
            the form reads tokens.
        scales: (N,) guidance scale of each image, that of the first channel.

    Returns:
        The features in this order: the latents; for each step of ``outputs`` the conditional, then
        the unconditional output; the same of ``tokens``; with ``squares``, their squares, value by
        value; the constant 1; and if the form is scaled, all of these again, multiplied by the
        scale.
    """
    images = [latents, *(side for pair in outputs for side in pair)]
    missing = 1 + 2 * (1 + form.outputs) - len(images)
    images += [np.zeros_like(latents)] * missing
    parts = [cells_from_latents(image, form, spec) for image in images]
    if form.reads_tokens:
        of_tokens = [side for pair in tokens for side in pair]
        nothing = np.zeros((len(latents), spec.tokens, spec.hidden), np.float32)
        of_tokens += [nothing] * (2 * (1 + form.tokens) - len(of_tokens))
        parts += of_tokens
        if form.features == "squares":
            parts += [np.square(side, dtype=np.float32) for side in of_tokens]
    parts.append(np.ones((*parts[0].shape[:2], 1), np.float32))
    features = np.concatenate(parts, axis=-1, dtype=np.float32)
    if form.scaled:
        weighted = features * scales.astype(np.float32)[:, None, None]
        features = np.concatenate([features, weighted], axis=-1)
    return np.asarray(features)


def head_correction(
    weights: np.ndarray, features: np.ndarray, form: HeadForm, spec: ModelSpec
) -> np.ndarray:
    """What a head adds to the latents after a step, (N, C, H, W) float32.

    Args:
        weights: W[k], (F, P).
        features: z[k] of `head_features`, (N, cells, F).
        form: what the head reads.
        spec: sizes of the model.
    """
    return latents_from_cells(features @ weights, form, spec)
