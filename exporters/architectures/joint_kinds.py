"""The graphs of models with two streams, from the declarations of their units.

A family says which layers of a checkpoint the layers of a module join. The declaration of a unit
decides which inputs and outputs its graph has. Names and shapes of the tensors of a checkpoint
follow from the graphs that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import torch
from torch import nn

from goc_deploy.blocks import Unit, UnitPlace
from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures.contract import own_positions
from goc_deploy.exporters.architectures.joint import outputs_of
from goc_deploy.exporters.architectures.joint_conditions import conditions_of
from goc_deploy.exporters.tracing import KINDS, SOME_TOKENS, Examples, Module, empty_module
from goc_deploy.exporters.units import GraphKind, Input, Slab
from goc_deploy.spec import ModelSpec

Parts = tuple[str | Slab, ...]
# Layer of a module -> the layers of a checkpoint, or rows of them, that it joins. A norm, which is
# only a parameter -> tensors.
Layers = Mapping[str, Parts]
Row = tuple[str, int]  # a layer of modulation, and which D of its rows
FindRow = Callable[[ModelSpec, UnitPlace, str], Row]
MakeModule = Callable[[], nn.Module]
MakeUnit = Callable[[ModelSpec, Unit, Sequence[str]], nn.Module]

ONCE = ("conditioning", "captions")  # graphs that run once per request
CAPTION_ROWS = Input("caption_rows", torch.tensor([1, 0]), {0: "batch"})
FINAL_ROWS = (("norm_out.linear", 1), ("norm_out.linear", 0))  # diffusers has the scale first


@dataclass(frozen=True)
class Tracer:
    """Makes the kinds of graphs of a model.

    Attributes:
        spec: sizes of the model.
        dtype: dtype of tokens and weights. None makes modules without memory, of which only the
            shapes can be read.
    """

    spec: ModelSpec
    dtype: torch.dtype | None

    @cached_property
    def examples(self) -> Examples:
        """Makes the example inputs."""
        return Examples(self.spec, self.dtype or torch.float32)

    def module(self, make: Callable[[], Module]) -> Module:
        """A module to trace."""
        if self.dtype is not None:
            return empty_module(make, self.dtype, self.examples.generator)
        with torch.device("meta"):
            return make()

    def kind(
        self,
        name: str,
        make: MakeModule,
        inputs: Sequence[Input],
        output: str,
        layers: Layers,
    ) -> GraphKind:
        """A kind of which a model has one graph, with one output."""
        module = self.module(make)
        copies = {name: bound(module, layers)}
        return GraphKind(name, module, tuple(inputs), (output,), copies, name in ONCE)


def unit_kinds(
    tracer: Tracer,
    make: Mapping[str, MakeUnit],
    layers: Mapping[str, Layers],
    blocks: Sequence[str],
    masked: Collection[str],
) -> Iterator[GraphKind]:
    """The graphs of the units, one kind for each declaration.

    Args:
        tracer: makes them.
        make: branch -> makes the module of a unit.
        layers: branch -> the layers of a block.
        blocks: names of the blocks.
        masked: the branches that mask the padding of captions.
    """
    spec = tracer.spec
    units = list(zip(spec.unit_names, spec.unit_places, spec.declared_units, strict=True))
    for unit in dict.fromkeys(spec.declared_units):
        inputs = _unit_inputs(tracer, unit, masked=unit.branch in masked)
        names = [given.name for given in inputs]
        module = tracer.module(partial(make[unit.branch], spec, unit, names))
        copies = {
            name: bound(module, layers[unit.branch], f"{blocks[place.block]}.")
            for name, place, own in units
            if own == unit
        }
        kind = f"{unit.branch} of {' and '.join(unit.reads)} with {len(unit.features)} features"
        yield GraphKind(kind, module, inputs, outputs_of(unit), copies)


def _unit_inputs(tracer: Tracer, unit: Unit, *, masked: bool) -> tuple[Input, ...]:
    """The example inputs of a unit: tokens, rows and gates, and what its attention reads."""
    spec, examples, reads_text = tracer.spec, tracer.examples, "text" in unit.reads
    gates = (feature.gate for feature in unit.features)
    turned = unit.branch != "mlp" and own_positions(spec).kind == "rotary"
    return (
        examples.tokens(),
        *((text_example(spec, examples),) if reads_text else ()),
        *examples.modulation(*unit.rows, *gates),
        *(angles_examples(spec, of_text=reads_text) if turned else ()),
        *((bias_example(spec), CAPTION_ROWS) if masked and reads_text else ()),
    )


def bound(module: nn.Module, layers: Layers, block: str = "") -> dict[str, tuple[Slab, ...]]:
    """Bind the parameters of a module to the tensors of a checkpoint.

    Args:
        module: the module.
        layers: the layers of the checkpoint, by those of the module.
        block: what precedes the names of the former.
    """
    binding = {}
    for name, _ in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        layer, suffix = (layer, f".{kind}") if kind in KINDS else (name, "")
        slabs = (Slab(part) if isinstance(part, str) else part for part in layers[layer])
        binding[name] = tuple(replace(slab, key=f"{block}{slab.key}{suffix}") for slab in slabs)
    return binding


def rows_of_table(
    spec: ModelSpec, find: FindRow, final: Sequence[Row] = FINAL_ROWS
) -> tuple[list[Row], list[int]]:
    """The rows that a modulation table is made of.

    Args:
        spec: the model.
        find: returns where a row of a unit is.
        final: shift and scale of the final layer.

    Returns:
        The different rows, in the order of the table; and for each row of the table its place among
        them.
    """
    places = spec.unit_places
    table = list(
        chain.from_iterable(
            spec.modulation.in_order(
                gates=[find(spec, places[f.unit], f.feature.gate) for f in spec.features],
                final=list(final),
                units=[
                    find(spec, place, name)
                    for place, unit in zip(places, spec.declared_units, strict=True)
                    for name in unit.rows
                ],
            )
        )
    )
    number = {row: i for i, row in enumerate(dict.fromkeys(table))}
    return list(number), [number[row] for row in table]


def slabs_of(rows: Iterable[Row], width: int) -> Parts:
    """Rows of modulation as parts of their layers, ``width`` rows each."""
    return tuple(Slab(layer, i * width, (i + 1) * width) for layer, i in rows)


def shapes_of_kinds(kinds: Iterable[GraphKind]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint that graphs read.

    Tensors that are read whole share the rows that others leave of a parameter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in kinds:
        sizes = {name: tuple(tensor.shape) for name, tensor in kind.module.named_parameters()}
        for binding in kind.copies.values():
            for name, slabs in binding.items():
                rows, *others = sizes[name]
                rows -= sum(slab.stop - slab.start for slab in slabs if slab.stop is not None)
                whole = sum(slab.stop is None for slab in slabs)
                assert rows == 0 if not whole else rows % whole == 0
                for slab in slabs:
                    stop = slab.start + rows // whole if slab.stop is None else slab.stop
                    known = shapes.get(slab.key, (0,))[0]
                    shapes[slab.key] = (max(stop, known), *others)
    return shapes


def captions_example(spec: ModelSpec, examples: Examples) -> Input:
    """``captions`` (K, L, C) float32."""
    shape = (2, spec.caption_tokens, spec.caption_channels)
    return Input("captions", examples.normal(*shape, dtype=torch.float32), {0: "captions"})


def text_example(spec: ModelSpec, examples: Examples) -> Input:
    """``text``: tokens (B, L, D)."""
    tokens = examples.normal(2, spec.caption_tokens, spec.hidden)
    return Input("text", tokens, {0: "batch"})


def bias_example(spec: ModelSpec) -> Input:
    """``bias`` (K, L) float32: the mask of two captions, of which one is short."""
    length = spec.caption_tokens
    bias = MASKED * (torch.arange(length) >= torch.tensor([[length // 2], [length]])).float()
    return Input("bias", bias, {0: "captions"})


def condition_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """``pooled`` (K, P) and ``guidance`` (1,) float32, of the models that read them."""
    pooled = examples.normal(2, spec.pooled_channels, dtype=torch.float32)
    inputs = {
        "pooled": Input("pooled", pooled, {0: "captions"}),
        "guidance": Input("guidance", torch.tensor([3.5]), {}),
    }
    return tuple(inputs[name] for name in conditions_of(spec))


def angles_examples(spec: ModelSpec, *, of_text: bool) -> tuple[Input, ...]:
    """``cos`` and ``sin`` of the image; ``text_cos`` and ``text_sin`` if the text is turned too."""
    speeds = torch.linspace(1, 0.1, spec.hidden // spec.heads // 2)
    image = torch.linspace(-1, 2, SOME_TOKENS)[:, None] * speeds
    text = torch.linspace(2, 5, spec.caption_tokens)[:, None] * speeds
    inputs = (
        Input("cos", image.cos(), {0: "tokens"}),
        Input("sin", image.sin(), {0: "tokens"}),
        Input("text_cos", text.cos(), {}),
        Input("text_sin", text.sin(), {}),
    )
    return inputs if of_text and own_positions(spec).turns_text else inputs[:2]
