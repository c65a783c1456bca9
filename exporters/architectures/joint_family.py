"""Families whose blocks have layers of their own for the image and for the text.

Their layers have the names of diffusers. What differs is declared in a `JointFamily`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from torch import Tensor

from goc_deploy.blocks import IMAGE_FEATURE, STREAMS, TEXT_FEATURE, Unit, UnitPlace
from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import own_positions
from goc_deploy.exporters.architectures.joint import AttnUnit, MlpUnit
from goc_deploy.exporters.architectures.joint_conditions import (
    CaptionsUnit,
    ConditioningUnit,
    conditions_of,
)
from goc_deploy.exporters.architectures.joint_kinds import (
    CAPTION_ROWS,
    FINAL_ROWS,
    FindRow,
    Layers,
    MakeModule,
    MakeUnit,
    Parts,
    Row,
    Tracer,
    bias_example,
    captions_example,
    condition_examples,
    rows_of_table,
    shapes_of_kinds,
    slabs_of,
    unit_kinds,
)
from goc_deploy.exporters.tracing import KINDS, ROWS, STEPS, check_shapes
from goc_deploy.exporters.units import DTYPES, GraphKind, Slab
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

SINGLE = "single"  # the branch of blocks whose attention and MLP are side by side
# The graphs that are not units, in order, and their outputs.
OUTPUTS = {"conditioning": "table", "captions": "text", "embed": "x", "final": "prediction"}
UNITS: Mapping[str, MakeUnit] = {"attn": AttnUnit, "mlp": MlpUnit}
READ = (*SHIFT_AND_SCALE, "shift_text", "scale_text")
BOTH = (IMAGE_FEATURE, TEXT_FEATURE)
BLOCK = (Unit("attn", READ, BOTH, STREAMS), Unit("mlp", READ, BOTH, STREAMS))
ATTENTION: Layers = {
    "image.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "text.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.kv": ("attn.add_k_proj", "attn.add_v_proj"),
    **{f"image.norm_{part}": (f"attn.norm_{part}.weight",) for part in "qk"},
    **{f"text.norm_{part}": (f"attn.norm_added_{part}.weight",) for part in "qk"},
    "proj": ("attn.to_out.0",),
    "proj_text": ("attn.to_add_out",),
}


def mlp_layers(image: str, text: str, first: str = "net.0.proj", second: str = "net.2") -> Layers:
    """The layers of the MLPs of both streams, by the names of the MLPs and of their layers."""
    mlps, layers = (("image", image), ("text", text)), (("fc1", first), ("fc2", second))
    return {f"{our}.{fc}": (f"{mlp}.{layer}",) for our, mlp in mlps for fc, layer in layers}


def rows_of_layers(image: str, text: str) -> dict[str, dict[str, Row]]:
    """Where the rows of a block are, if each stream has one layer: those of attention first."""
    names = (*SHIFT_AND_SCALE, "gate")
    return {
        branch: {
            f"{name}{suffix}": (layer, first + i)
            for suffix, layer in (("", image), ("_text", text))
            for i, name in enumerate(names)
        }
        for branch, first in (("attn", 0), ("mlp", len(names)))
    }


def channels_first(layer: str, spec: ModelSpec) -> Parts:
    """A final layer whose rows are (C, p, p), in the order (p, p, C) of `any_size.FinalUnit`."""
    pixels = spec.patch**2
    rows = (c * pixels + pixel for pixel in range(pixels) for c in range(spec.output_channels))
    return tuple(Slab(layer, row, row + 1) for row in rows)


@lru_cache(maxsize=64)
def block_names(spec: ModelSpec) -> tuple[str, ...]:
    """The name of each block, in the order of execution."""
    single = [SINGLE in branches for branches in spec.branches_of_blocks]
    double = single.count(False)  # they come first
    return (
        *(f"transformer_blocks.{i}" for i in range(double)),
        *(f"single_transformer_blocks.{i}" for i in range(spec.depth - double)),
    )


def rows_in_blocks(rows: Mapping[str, Mapping[str, Row]]) -> FindRow:
    """Find rows of modulation in layers of the block that reads them.

    Args:
        rows: branch -> name of a row -> its layer in a block, and its place in that.
    """

    def find(spec: ModelSpec, place: UnitPlace, name: str) -> Row:
        layer, chunk = rows[place.branch][name]
        return f"{block_names(spec)[place.block]}.{layer}", chunk

    return find


@dataclass(frozen=True)
class JointFamily:
    """What distinguishes a family.

    Attributes:
        name: name of the family, for messages.
        layers: returns the layers of the checkpoint for each branch, by their names in a block, and
            for ``captions``, ``embed`` and ``final``; also for ``conditioning`` if it does not have
            the embedders of diffusers.
        row: returns where a row of the modulation table is, by the place of its unit and its name.
        units: branch -> makes the module of a unit.
        blocks: returns the name of each block.
        embedders: the layer with the embedders of timesteps, pooled captions and guidance.
        kinds: the tensors of a linear layer. Without ``bias``, no layer has one.
        final_rows: shift and scale of the final layer, if they are rows of a layer of modulation.
        masked: the branches, and ``captions``, that mask the padding of captions.
        fp16: whether all values fit into fp16.
        stored: returns the model whose graphs read all tensors of a checkpoint, if some are stored
            for blocks that do not use them.
        unread: returns names and shapes of other tensors that no graph reads, or reads in another
            shape.
    """

    name: str
    layers: Callable[[ModelSpec], Mapping[str, Layers]]
    row: FindRow
    units: Mapping[str, MakeUnit]
    blocks: Callable[[ModelSpec], Sequence[str]] = block_names
    embedders: str = "time_text_embed"
    kinds: tuple[str, ...] = KINDS
    final_rows: tuple[Row, ...] = FINAL_ROWS
    masked: tuple[str, ...] = ()
    fp16: bool = False
    stored: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    unread: Callable[[ModelSpec], Mapping[str, tuple[int, ...]]] = lambda _spec: {}

    def graph_kinds(self, spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
        """The graphs of a model, in the order in which they are written.

        Raises:
            UsageError: the precision is fp16, and tokens of the text exceed its range.
        """
        if precision == "fp16" and not self.fp16:
            raise UsageError(
                f"`precision=fp16`: the text tokens of a {self.name} exceed the range of fp16; use "
                "bf16 or fp32"
            )
        return self._graphs(Tracer(spec, DTYPES[precision]))

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a model."""
        kinds = self._graphs(Tracer(self.stored(spec), None))
        return {**shapes_of_kinds(kinds), **self.unread(spec)}

    def check_tensors(self, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """Check names and shapes of tensors.

        Raises:
            ModelError: tensors are missing, unexpected or of another shape; the message lists up to
                ten of each.
        """
        what = f"a {self.name} of {spec.depth} blocks and width {spec.hidden}"
        check_shapes(tensors, self.shapes(spec), what)

    def modules(self, spec: ModelSpec, places: Sequence[int]) -> Mapping[str, MakeModule]:
        """What makes the modules of `OUTPUTS`; for ``places`` see `ConditioningUnit`."""
        bias, captions = "bias" in self.kinds, self.layers(spec)["captions"]
        return {
            "conditioning": partial(ConditioningUnit, spec, places, bias=bias),
            "captions": partial(CaptionsUnit, spec, bias=bias, normed="norm" in captions),
            "embed": partial(any_size.EmbedUnit, spec, bias=bias),
            "final": partial(any_size.FinalUnit, spec, bias=bias),
        }

    def _graphs(self, tracer: Tracer) -> tuple[GraphKind, ...]:
        spec, examples = tracer.spec, tracer.examples
        rows, places = rows_of_table(spec, self.row, self.final_rows)
        layers = {"conditioning": self._embedders(spec), **self.layers(spec)}
        layers["conditioning"] = {
            **layers["conditioning"],
            "modulation": slabs_of(rows, spec.hidden),
        }
        mask = (bias_example(spec),) if "captions" in self.masked else ()
        sine = own_positions(spec).kind == "sine"
        table = (any_size.table_example(spec, examples),) if sine else ()
        tokens = any_size.grid_example(spec, examples)
        inputs = {
            "conditioning": (STEPS, *condition_examples(spec, examples)),
            "captions": (captions_example(spec, examples), *mask, CAPTION_ROWS),
            "embed": (any_size.latents_example(spec, examples), ROWS, *table),
            "final": (tokens, *examples.modulation(*SHIFT_AND_SCALE)),
        }
        modules = self.modules(spec, places)
        *first, final = (
            tracer.kind(name, modules[name], inputs[name], output, layers[name])
            for name, output in OUTPUTS.items()
        )
        blocks = self.blocks(spec)
        return (*first, *unit_kinds(tracer, self.units, layers, blocks, self.masked), final)

    def _embedders(self, spec: ModelSpec) -> Layers:
        names = {"pooled": "text_embedder", "guidance": "guidance_embedder"}
        embedders = ("timestep_embedder", *(names[given] for given in conditions_of(spec)))
        layers = [f"{embedder}.linear_{i}" for embedder in embedders for i in (1, 2)]
        return {layer: (f"{self.embedders}.{layer}",) for layer in layers}
