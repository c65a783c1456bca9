"""The manifest: what an engine directory holds. Its presence says that the directory is whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any

from msgspec import Meta

from goc_deploy.engine_dir.keys import EngineWeights, Target
from goc_deploy.precision import Precision
from goc_deploy.samplers.process import Process
from goc_deploy.spec import Count, DecoderSpec, ModelSpec, Size, TextSpec

MANIFEST_NAME = "manifest.json"
IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the directory.

    Attributes:
        path: relative, with forward slashes.
        size: bytes.
        sha256: hexadecimal digest of the bytes.
    """

    path: str
    size: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor in a weights file, in the engine's precision.

    Attributes:
        name: of the graph's initializer.
        offset: bytes from the start of the file.
        shape: dimensions.
    """

    name: str
    offset: Count
    shape: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """An exported graph: an ONNX file and, where it has weights, their file.

    Attributes:
        name: ``conditioning``, ``modulation``, ``embed``, ``block_00_attn``, ..., ``collect``, ``final``, ``sampler``,
            ``sampler_lag1``, ..., ``captions``, ``decoder``, ``text_encoder``.
        onnx: path of the graph.
        weights: path of the external data, or None.
        parameters: what lies where in the weights file.
        weights_are_inputs: the parameters are inputs of the graph, which reads them in the mapped file, instead of
            initializers that are copied at load.
        relative_l2: largest error to PyTorch over the outputs, measured at export, or None where it has no weights.
        precision: of the parameters.
    """

    name: str
    onnx: str
    weights: str | None
    parameters: tuple[Parameter, ...]
    weights_are_inputs: bool
    relative_l2: float | None
    precision: Precision


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A plan of the directory: its name, the SPEC it came from, and its files."""

    name: str
    spec: str
    plan: str
    schedule: str


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A TensorRT engine of the directory.

    Attributes:
        path: of the file.
        key: of the `goc_deploy.engine_dir.keys.Recipe` that it was built by.
        target: what it was built for.
        weights: ``embedded``, ``shared``, or ``none``.
        graphs: ONNX files that it serves: one, or all of one kind where the weights are shared.
        kernels: launches of one run, or None where the library does not tell.
        plugin_layers: how many of them are the plugin.
        activation_bytes: scratch memory at the largest shapes, or None where the library does not tell.
        workspace_bytes: the limit on scratch memory that it was built under, 0 for none.
        optima: of each optimisation profile, the sizes that its kernels were chosen for, such as ``batch=2``.
    """

    path: str
    key: str
    target: Target
    weights: EngineWeights
    graphs: tuple[str, ...]
    kernels: Count | None
    plugin_layers: Count
    activation_bytes: Count | None
    workspace_bytes: Count = 0
    optima: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an engine directory holds.

    Attributes:
        model: sizes of the model.
        precision: ``fp32``, ``fp16`` or ``bf16``: dtype of weights, tokens and history.
        max_batch: most images per run.
        units: exported graphs that do not depend on a plan.
        predict: predict signature -> path of its graph.
        plans: in order of preference.
        files: every file with size and digest.
        class_names: one per class, synonyms separated by commas; empty where the checkpoint has none.
        provenance: checkpoint digest, versions, options. For people; nothing is decided by it but "up to date".
        engines: TensorRT engines, a cache: the ONNX files and plans are the source of truth.
        decoder: what unit ``decoder`` makes of latents, or None where there is none.
        captions: path of the captions that stand for labels, or None where there are none.
        text: what unit ``text_encoder`` takes, or None where there is none.
        segments: segment signature -> path of its graph, which holds all units of the blocks.
        scheduler: settings of the scheduler of diffusers that came with the model, or None where none did.
    """

    model: ModelSpec
    precision: Precision
    max_batch: Size
    units: tuple[Unit, ...]
    predict: dict[str, str]
    plans: tuple[PlanEntry, ...]
    files: tuple[FileEntry, ...]
    provenance: dict[str, Any]
    engines: tuple[EngineEntry, ...] = ()
    class_names: tuple[str, ...] = ()
    decoder: DecoderSpec | None = None
    captions: str | None = None
    text: TextSpec | None = None
    segments: dict[str, str] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None

    @property
    def process(self) -> Process:
        """What the model was trained to undo."""
        return Process(self.model.prediction, self.scheduler)

    def predict_unit(self, signature: str) -> Unit:
        """A predict graph as a unit without weights, named after its file."""
        return self._unit_of_plans(self.predict[signature])

    def segment_unit(self, signature: str) -> Unit:
        """A segment as a unit without weights of its own, named after its file; `parts` says whose it has."""
        return self._unit_of_plans(self.segments[signature])

    def _unit_of_plans(self, path: str) -> Unit:
        return Unit(PurePosixPath(path).stem, path, None, (), False, None, self.precision)

    def graphs(self) -> Iterator[Unit]:
        """Every graph as a unit: those that do not depend on a plan, predict graphs, segments."""
        yield from self.units
        yield from map(self.predict_unit, self.predict)
        yield from map(self.segment_unit, self.segments)

    def parts(self, unit: Unit) -> Mapping[str, Unit]:
        """The units whose weights a graph has, by the prefix of their names in it: itself, or those of a segment."""
        if unit.onnx not in self.segments.values():
            return {"": unit} if unit.weights else {}
        known = {part.name: part for part in self.units}
        return {f"{name}.": known[name] for name in self.model.unit_names}

    @property
    def image_side(self) -> int | None:
        """Height and width of the images, or None where there are only latents."""
        if self.decoder is not None:
            return self.model.side * self.decoder.upscale
        return self.model.side if self.model.channels in IMAGE_CHANNELS else None
