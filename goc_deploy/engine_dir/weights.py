"""The weights of an engine directory, mapped and verified."""

from __future__ import annotations

from collections.abc import Mapping

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.protocols import Buffer, mapped_buffer


def mapped_weights(
    unit: GraphEntry, weights: memoryview
) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
    """View a unit's weights in the content of its file, as arguments of `Backend.load`.

    Returns:
        (initializers, inputs), each by name.
    """
    buffers = {
        p.name: mapped_buffer(weights, p.offset, p.shape, unit.dtype(p)) for p in unit.parameters
    }
    return ({}, buffers) if unit.weights_are_inputs else (buffers, {})


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
