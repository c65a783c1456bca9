"""The manifest, which describes an engine directory. A directory that has one is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any

from msgspec import Meta

from goc_deploy.engine_dir.keys import EngineWeightMode, Target
from goc_deploy.precision import DTYPE_OF_PRECISION, Precision, WeightFormat, tensor_bytes
from goc_deploy.samplers.process import Process
from goc_deploy.spec import (
    TEXT_ENCODER,
    ClipSpec,
    Count,
    DecoderSpec,
    ModelSpec,
    Size,
    TextSpec,
    VideoDecoderSpec,
    clip_unit,
)

MANIFEST_NAME = "manifest.json"
IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the directory.

    Attributes:
        path: relative, with forward slashes.
        size: size in bytes.
        sha256: hexadecimal digest of the bytes.
    """

    path: str
    size: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor in a weights file.

    Attributes:
        name: name of the graph's initializer.
        offset: number of bytes from the start of the file.
        shape: dimensions.
        dtype: ``int8``, ``int4`` or ``float8_e4m3fn`` of a quantised weight; None is the precision
            of the graph.
    """

    name: str
    offset: Count
    shape: tuple[Count, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """An exported graph: an ONNX file, and a weights file if the graph has weights.

    Attributes:
        name: ``conditioning``, ``modulation``, ``embed``, ``block_00_attn``, ..., ``collect``,
            ``residual``, ``final``, ``sampler``, ``sampler_lag1``, ..., ``captions``, ``decoder``,
            ``video_decoder``, ``text_encoder``, ``clip_1``, ``clip_2``.
        onnx: path of the graph.
        weights_file: path of the external data, or None.
        parameters: position of each tensor in the weights file.
        weights_are_inputs: the parameters are inputs of the graph, which reads them in the mapped
            file, instead of initializers that are copied during the load.
        relative_l2: largest error compared with PyTorch over the outputs, measured at export, or
            None if the graph has no weights.
        precision: precision of the parameters that are not quantised.
        weight_format: format of the quantised weights, or None if the graph has none.
    """

    name: str
    onnx: str
    weights_file: str | None
    parameters: tuple[Parameter, ...]
    weights_are_inputs: bool
    relative_l2: float | None
    precision: Precision
    weight_format: WeightFormat | None = None

    def dtype(self, parameter: Parameter) -> str:
        """The dtype of a parameter of this graph."""
        return parameter.dtype or DTYPE_OF_PRECISION[self.precision]

    def end(self, parameter: Parameter) -> int:
        """The position in the weights file after the last byte of a parameter."""
        return parameter.offset + tensor_bytes(self.dtype(parameter), parameter.shape)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A plan of the directory.

    Attributes:
        name: name of the plan.
        policy: the SPEC of its policy.
        plan: path of the plan.
        schedule: path of the schedule that it was compiled from.
        head: path of the weights of its head, or None without a head.
    """

    name: str
    policy: str
    plan: str
    schedule: str
    head: str | None = None


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """A LoRA that was merged into the weights of the checkpoint.

    Attributes:
        file: name of its file, or of its folder and file.
        sha256: hexadecimal digest of the file.
        scale: factor that the user gave; the change is also multiplied by alpha / rank.
        alpha_source: where alpha was read: ``tensors``, ``metadata``, ``adapter_config.json``, or
            ``rank`` if the file has none, so that alpha is the rank.
        ranks: ranks of its layers, ascending.
        layers: number of linear layers that it changes.
    """

    file: str
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scale: float
    alpha_source: str
    ranks: tuple[Count, ...]
    layers: Count


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A TensorRT engine of the directory.

    Attributes:
        path: path of the file.
        key: key of the `goc_deploy.engine_dir.keys.Recipe` that it was built by.
        target: the target that it was built for.
        weight_mode: ``embedded``, ``shared``, or ``none``.
        graphs: ONNX files that it serves: one file, or all of one kind if the weights are shared.
        kernels: number of kernel launches per run, or None if the library does not report it.
        plugin_layers: number of these that are the plugin.
        scratch_bytes: scratch memory at the largest shapes, or None if the library does not report
            it.
        scratch_limit_bytes: limit on scratch memory during the build, 0 for none.
        optima: per optimisation profile, the sizes that its kernels were chosen for, such as
            ``batch=2``.
    """

    path: str
    key: str
    target: Target
    weight_mode: EngineWeightMode
    graphs: tuple[str, ...]
    kernels: Count | None
    plugin_layers: Count
    scratch_bytes: Count | None
    scratch_limit_bytes: Count = 0
    optima: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of an engine directory.

    Attributes:
        model: sizes of the model.
        precision: ``fp32``, ``fp16`` or ``bf16``: number format of weights, tokens and history.
        max_batch: largest number of images per run.
        graphs: exported graphs that do not depend on a plan.
        predict: predict signature -> path of its graph.
        plans: plans in order of preference.
        files: every file with size and digest.
        class_names: one per class, with synonyms separated by commas; empty if the checkpoint has
            no names.
        provenance: checkpoint digest, versions and options, for people. The program uses it only to
            decide whether an export is up to date.
        engines: TensorRT engines, a cache: the ONNX files and plans are the source of truth.
        decoder: sizes of unit ``decoder``, or None without a decoder.
        stored_captions: path of the stored captions, or None without any.
        text: inputs of unit ``text_encoder``, or None without a T5.
        segments: segment signature -> path of its graph, which contains all units of the blocks.
        scheduler: settings of the diffusers scheduler that came with the model, or None without
            one.
        heads: name of a sampler graph that applies a head -> path of the graph.
        loras: LoRAs that were merged into the weights, by ascending digest.
        tables: key of a stored modulation table -> path; see
            `goc_deploy.compiler.modulation_file.table_key`.
        video_decoder: sizes of unit ``video_decoder``, or None without one.
        clip: inputs and outputs of the units ``clip_1``, ``clip_2``, in the order in which their
            pooled embeddings are joined.
    """

    model: ModelSpec
    precision: Precision
    max_batch: Size
    graphs: tuple[GraphEntry, ...]
    predict: dict[str, str]
    plans: tuple[PlanEntry, ...]
    files: tuple[FileEntry, ...]
    provenance: dict[str, Any]
    engines: tuple[EngineEntry, ...] = ()
    class_names: tuple[str, ...] = ()
    decoder: DecoderSpec | None = None
    stored_captions: str | None = None
    text: TextSpec | None = None
    segments: dict[str, str] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    heads: dict[str, str] = field(default_factory=dict)
    loras: tuple[LoraEntry, ...] = ()
    video_decoder: VideoDecoderSpec | None = None
    clip: tuple[ClipSpec, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)

    @property
    def text_encoders(self) -> dict[str, TextSpec | ClipSpec]:
        """The text encoders by the names of their units; empty if prompts cannot be encoded."""
        encoders: dict[str, TextSpec | ClipSpec] = {
            clip_unit(i): clip for i, clip in enumerate(self.clip)
        }
        return encoders if self.text is None else {**encoders, TEXT_ENCODER: self.text}

    @property
    def process(self) -> Process:
        """The diffusion process that the model was trained on."""
        return Process(self.model.prediction_type, self.scheduler, self.model.tokens)

    def predict_graph(self, signature: str) -> GraphEntry:
        """Return the entry of a predict graph, which has no weights, named after its file."""
        return self._graph_of_plans(self.predict[signature])

    def segment_graph(self, signature: str) -> GraphEntry:
        """Return the entry of a segment, which has no weights of its own; see `parts`."""
        return self._graph_of_plans(self.segments[signature])

    def head_graph(self, name: str) -> GraphEntry:
        """Return the entry of a sampler graph that applies a head, which has no weights."""
        return self._graph_of_plans(self.heads[name])

    def _graph_of_plans(self, path: str) -> GraphEntry:
        return GraphEntry(PurePosixPath(path).stem, path, None, (), False, None, self.precision)

    def all_graphs(self) -> Iterator[GraphEntry]:
        """Yield every graph: those that no plan decides, predict graphs, segments, heads."""
        yield from self.graphs
        yield from map(self.predict_graph, self.predict)
        yield from map(self.segment_graph, self.segments)
        yield from map(self.head_graph, self.heads)

    def parts(self, unit: GraphEntry) -> Mapping[str, GraphEntry]:
        """Return the units whose weights a graph has, by the prefix of their names in the graph.

        A segment has those of all its units, and any other graph only its own.
        """
        if unit.onnx not in self.segments.values():
            return {"": unit} if unit.weights_file else {}
        by_name = {part.name: part for part in self.graphs}
        return {f"{name}.": by_name[name] for name in self.model.unit_names}

    @property
    def checkpoint_record(self) -> dict[str, Any]:
        """The digest of the checkpoint, for records of calibrations; empty if it is unknown."""
        known = self.provenance
        return {key: known[key] for key in ("checkpoint_sha256",) if key in known}

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of an image per latent pixel and side."""
        decoder = self.decoder or self.video_decoder
        return self.model.vae_scale if decoder is None else decoder.upscale

    @property
    def video_tile(self) -> int:
        """Side of a tile of the decoder of videos in latent pixels; 0 if there are none."""
        return 0 if self.video_decoder is None else self.video_decoder.tile

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images or frames, or None without a decoder of latents."""
        decoder = self.decoder or self.video_decoder
        if decoder is None and self.model.channels not in IMAGE_CHANNELS:
            return None
        scale = 1 if decoder is None else decoder.upscale
        height, width = self.model.sample[-2:]
        return height * scale, width * scale
