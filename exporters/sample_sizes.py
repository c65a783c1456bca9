"""The sizes of samples that an export allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.contract import Architecture
from goc_deploy.options import ExportOptions
from goc_deploy.size_inputs import size_tensors
from goc_deploy.sizes import grid_from_size, in_words
from goc_deploy.spec import MAX_REFERENCES, ModelSpec

POSITION_TABLE = "pos_embed"
TABLE_TOLERANCE = 1e-4  # of sines and cosines in float32; tables in half precision differ more


def spec_for_sizes(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    options: ExportOptions,
    pixels: int,
) -> ModelSpec:
    """The model with the usual and the largest size that the options ask for.

    Args:
        spec: the model, with the size that it was trained for.
        tensors: the checkpoint, in the public layout.
        architecture: the family.
        options: ``size``, ``max_size``, ``frames`` and ``max_frames``. Without any of them, the
            graphs accept the size of the training only. And ``max_references``.
        pixels: pixels per latent pixel and side.

    Raises:
        UsageError: a size is not possible with this model, or the usual size is the larger one; or
            the model does not read that many reference images.
        ModelError: the model has no positions for other sizes.
    """
    spec = _with_references(spec, options.max_references)
    asked = (options.size, options.max_size, options.frames, options.max_frames)
    if not any(asked) and not spec.any_size:
        return spec
    if spec.positions is None:
        spec = _with_computed_positions(spec, tensors, architecture)
    usual = grid_from_size(options.size, options.frames, spec, pixels)
    spec = replace(spec, grid=usual, max_grid=usual)
    most = grid_from_size(options.max_size, options.max_frames, spec, pixels)
    spec = replace(spec, max_grid=most)
    if spec.tokens > spec.largest.tokens or usual[:-2] > most[:-2]:
        raise UsageError(
            f"the usual size {in_words(spec, pixels)} is larger than the largest, "
            f"{in_words(spec.largest, pixels)}; give a larger `max_size` or a smaller `size`"
        )
    return spec


def _with_references(spec: ModelSpec, count: int | None) -> ModelSpec:
    """The model with this largest number of reference images; None keeps its own."""
    if count in (None, spec.max_references):
        return spec
    if not spec.max_references:
        raise UsageError("`max_references`: this model reads no reference images; leave it out")
    if not 1 <= count <= MAX_REFERENCES:
        raise UsageError(f"`max_references={count}` must be within 1..{MAX_REFERENCES}")
    return replace(spec, max_references=count)


def _with_computed_positions(
    spec: ModelSpec, tensors: Mapping[str, Tensor], architecture: Architecture
) -> ModelSpec:
    """The model with positions that the host computes in place of its table."""
    spec = replace(spec, positions=architecture.positions(spec))
    table = tensors[POSITION_TABLE].float().numpy().reshape(*spec.axes, spec.hidden)
    computed = size_tensors(spec)["positions"]
    if not np.allclose(table, computed, rtol=0, atol=TABLE_TOLERANCE):
        raise ModelError(
            "the position table of the checkpoint was learned, so there is none for other sizes; "
            "leave out `size` and `max_size`"
        )
    return spec
