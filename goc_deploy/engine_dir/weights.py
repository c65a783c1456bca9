"""The weights of an engine directory, mapped and verified."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.errors import EngineDirError
from goc_deploy.protocols import NUMPY_DTYPES, Buffer, float32_from_bfloat16, mapped_buffer

# How the names of scales end that are made when weights are quantised.
SCALES = (".scales", ".input_scale", ".smoothing")


def mapped_weights(
    unit: GraphEntry, weights: memoryview
) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
    """View a unit's weights in the content of its file, as arguments of `Backend.load`.

    Returns:
        (initializers, inputs), each by name.

    Raises:
        EngineDirError: a scale of a quantised tensor is zero, negative, infinite or not a number.
    """
    if unit.weight_format is not None:
        _check_scales(unit, weights)
    buffers = {
        p.name: mapped_buffer(weights, p.offset, p.shape, unit.dtype(p)) for p in unit.parameters
    }
    return ({}, buffers) if unit.weights_are_inputs else (buffers, {})


def _check_scales(unit: GraphEntry, weights: memoryview) -> None:
    for p in unit.parameters:
        if p.dtype is None and p.name.endswith(SCALES):
            dtype = NUMPY_DTYPES[unit.dtype(p)]
            stored = np.frombuffer(weights, dtype, math.prod(p.shape), p.offset)
            values = float32_from_bfloat16(stored) if unit.precision == "bf16" else stored
            if not (np.isfinite(values) & (values > 0)).all():
                raise EngineDirError(
                    f"{unit.weights_file}: {p.name} has a value that is not a positive number; "
                    "export again"
                )


def mapped_parts(
    parts: Mapping[str, GraphEntry], content: Mapping[str, memoryview]
) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
    """View the weights of all parts of a graph, see `mapped_weights`.

    Args:
        parts: prefix in the graph -> unit, as `Manifest.parts` returns them.
        content: path -> content of the weights files.
    """
    initializers: dict[str, Buffer] = {}
    inputs: dict[str, Buffer] = {}
    for prefix, unit in parts.items():
        assert unit.weights_file is not None
        of_unit = mapped_weights(unit, content[unit.weights_file])
        for whole, mine in zip((initializers, inputs), of_unit, strict=True):
            whole.update({prefix + name: buffer for name, buffer in mine.items()})
    return initializers, inputs
