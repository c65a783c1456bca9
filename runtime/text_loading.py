"""Loading the text encoders of an engine directory, for good or for each use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from goc_deploy.conditions.text import TextEncoder
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.engine_dir.weights import mapped_parts
from goc_deploy.errors import GocError
from goc_deploy.host_memory import return_free_pages
from goc_deploy.protocols import Backend, Engine


def load_graph(
    directory: EngineDir, unit: GraphEntry, content: Mapping[str, memoryview], backend: Backend
) -> Engine:
    """Check a graph and load it.

    Args:
        directory: the engine directory.
        unit: the graph.
        content: verified files of the directory by path, with those of the graph.
        backend: loads the graph.

    Raises:
        EngineDirError, SafetyError: the graph reads more than its weights, or is not valid.
    """
    parts, where = directory.manifest.parts(unit), str(directory.path / unit.onnx)
    check_graph(content[unit.onnx], external_tensors(parts), where)
    try:
        return backend.load(content[unit.onnx], *mapped_parts(parts, content))
    except GocError as cause:
        raise type(cause)(f"{where}: {cause}") from cause


def text_graphs(manifest: Manifest) -> tuple[GraphEntry, ...]:
    """The graphs of the text encoders."""
    return tuple(unit for unit in manifest.graphs if unit.name in manifest.text_encoders)


def load_text_encoder(
    directory: EngineDir, engines: Mapping[str, Engine] | None, backend: Backend
) -> TextEncoder | None:
    """The text encoder, or None if there is none or the package tokenizers is not installed.

    In the second case, the pipeline raises an error when it gets a prompt.

    Args:
        directory: the engine directory.
        engines: the engines by name; None loads them whenever prompts must be encoded.
        backend: owner of the buffers.

    Raises:
        EngineDirError, SafetyError: a file is missing, corrupt or not from this package.
    """
    manifest, encoders = directory.manifest, directory.manifest.text_encoders
    if not encoders or find_spec("tokenizers") is None:
        return None
    tokenizers = {name: bytes(directory.read(of.tokenizer)) for name, of in encoders.items()}
    most = 2 * manifest.max_batch  # the largest batch of TensorRT engines
    loaded = _on_demand(directory, backend) if engines is None else engines
    return TextEncoder(loaded, tokenizers, backend, manifest.model, encoders, most)


def _on_demand(directory: EngineDir, backend: Backend) -> Callable[[], Mapping[str, Engine]]:
    """A function that loads the engines of text encoders from files that are verified here."""
    manifest = directory.manifest
    graphs = text_graphs(manifest)
    paths = {unit.onnx for unit in graphs} | {
        part.weights_file
        for unit in graphs
        for part in manifest.parts(unit).values()
        if part.weights_file
    }
    content = {path: directory.read(path) for path in sorted(paths)}
    return_free_pages(content.values())

    def load() -> Mapping[str, Engine]:
        engines = {unit.name: load_graph(directory, unit, content, backend) for unit in graphs}
        return_free_pages(content.values())
        return engines

    return load
