"""FLUX.1 dev and schnell: double blocks with two streams, then single blocks that join them.

All modulation depends on the timestep, the pooled caption and, in FLUX.1-dev, the guidance scale.
It is hoisted out of the step loop, as in PixArt. Captions are not masked: the padding of a short
one is read as tokens.

Source: the open models of Black Forest Labs, 2024; names and arithmetic are those of diffusers'
``FluxTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain

import torch

from goc_deploy.blocks import Unit
from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.flux_diffusers import (
    VALUES_OF_PATCH,
    block_names,
    check_tensors,
    spec_from_config,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.flux_files import AUTHORS, spec_from_tensors
from goc_deploy.exporters.architectures.flux_units import (
    AttnUnit,
    CaptionsUnit,
    ConditioningUnit,
    MlpUnit,
    SingleUnit,
)
from goc_deploy.exporters.tracing import ROWS, SOME_TOKENS, STEPS, Examples, Module, empty_module
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions

KINDS = ("weight", "bias")
OUTPUTS = ("x_out", "text_out", "feature", "feature_text")
# Where a row is in the modulation layer of its block and stream:
CHUNKS = {
    "attn": {"shift": 0, "scale": 1, "gate": 2},
    "mlp": {"shift": 3, "scale": 4, "gate": 5},
    "single": {"shift": 0, "scale": 1, "gate": 2},
}


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a FLUX.1, in the order in which they are written.

    Raises:
        UsageError: the precision is fp16.
    """
    if precision == "fp16":
        raise UsageError(
            "`precision=fp16`: the text tokens of a FLUX.1 exceed the range of fp16; use bf16 or "
            "fp32"
        )
    dtype = DTYPES[precision]
    examples = Examples(spec, dtype)

    def traceable(make: Callable[[ModelSpec], Module]) -> Module:
        return empty_module(lambda: make(spec), dtype, examples.generator)

    return (
        GraphKind(
            "conditioning",
            traceable(ConditioningUnit),
            (STEPS, *_condition_examples(spec, examples)),
            ("table",),
            {"conditioning": _conditioning(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            traceable(CaptionsUnit),
            _caption_examples(spec, examples),
            ("text",),
            {"captions": _layers({"context_embedder": "context_embedder"})},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            traceable(any_size.EmbedUnit),
            (any_size.latents_example(spec, examples), ROWS),
            ("x",),
            {"embed": _layers({"x_embedder.proj": "x_embedder"})},
        ),
        *_block_kinds(spec, examples, traceable),
        GraphKind(
            "final",
            traceable(any_size.FinalUnit),
            (any_size.grid_example(spec, examples), *examples.modulation("shift", "scale")),
            ("prediction",),
            {"final": _final(spec)},
        ),
    )


def _block_kinds(
    spec: ModelSpec,
    examples: Examples,
    traceable: Callable[[Callable[[ModelSpec], torch.nn.Module]], torch.nn.Module],
) -> tuple[GraphKind, ...]:
    """The units of double blocks, of single blocks, and of the last one, if there are any."""
    of_text = Input("text", examples.normal(2, spec.caption_tokens, spec.hidden), {0: "batch"})
    tokens, angles = (examples.tokens(), of_text), _angles(spec)
    both = ("shift", "scale", "gate", "shift_text", "scale_text", "gate_text")
    one = ("shift", "scale", "gate", "gate_text")
    last = spec.depth - 1
    made: tuple[tuple[str, Callable[[ModelSpec], torch.nn.Module], tuple[str, ...]], ...] = (
        ("attn", AttnUnit, both),
        ("mlp", MlpUnit, both),
        ("single", partial(SingleUnit, last=False), one),
        ("last", partial(SingleUnit, last=True), one[:-1]),
    )
    copies: dict[str, dict[str, Binding]] = {kind: {} for kind, _, _ in made}
    for i, (block, branches) in enumerate(
        zip(block_names(spec), spec.branches_of_blocks, strict=True)
    ):
        for branch in branches:
            bound = _BINDINGS[branch](block)
            copies["last" if i == last else branch][f"block_{i:02d}_{branch}"] = bound
    return tuple(
        GraphKind(
            kind,
            traceable(make),
            (*tokens, *examples.modulation(*rows), *(() if kind == "mlp" else angles)),
            OUTPUTS if kind != "last" else ("x_out", "feature"),
            copies[kind],
        )
        for kind, make, rows in made
        if copies[kind]
    )


def _condition_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """Pooled captions, and the guidance scale if the model reads it."""
    pooled = examples.normal(2, spec.pooled_channels, dtype=torch.float32)
    guidance = Input("guidance", torch.tensor([3.5]), {})
    return (
        Input("pooled", pooled, {0: "captions"}),
        *((guidance,) if spec.embedded_guidance else ()),
    )


def _caption_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    shape = (2, spec.caption_tokens, spec.caption_channels)
    return (
        Input("captions", examples.normal(*shape, dtype=torch.float32), {0: "captions"}),
        Input("caption_rows", torch.tensor([1, 0, 1]), {0: "batch"}),
    )


def _angles(spec: ModelSpec) -> tuple[Input, ...]:
    """``cos`` and ``sin`` of the example tokens."""
    angles = torch.linspace(0, 3, SOME_TOKENS)[:, None] * torch.linspace(
        1, 0.1, spec.hidden // spec.heads // 2
    )
    return (
        Input("cos", angles.cos(), {0: "tokens"}),
        Input("sin", angles.sin(), {0: "tokens"}),
    )


def _layers(names: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[Slab, ...]]:
    """Bind linear layers: name in the module -> the layers of the checkpoint that it joins."""
    return {
        f"{ours}.{kind}": tuple(
            Slab(f"{layer}.{kind}") for layer in ((theirs,) if isinstance(theirs, str) else theirs)
        )
        for ours, theirs in names.items()
        for kind in KINDS
    }


def _norms(attn: str, ours: str = "", theirs: str = "") -> dict[str, tuple[Slab, ...]]:
    return {f"{ours}norm_{part}": (Slab(f"{attn}.norm_{theirs}{part}.weight"),) for part in "qk"}


def _attn(block: str) -> Binding:
    attn = f"{block}.attn"
    layers: dict[str, str | tuple[str, ...]] = {
        "image.qkv": tuple(f"{attn}.to_{part}" for part in "qkv"),
        "text.qkv": tuple(f"{attn}.add_{part}_proj" for part in "qkv"),
        "image.proj": f"{attn}.to_out.0",
        "text.proj": f"{attn}.to_add_out",
    }
    norms = {**_norms(attn, "image."), **_norms(attn, "text.", "added_")}
    return {**_layers(layers), **norms}


def _mlp(block: str) -> Binding:
    return _layers(
        {
            f"{stream}.fc{i}": f"{block}.{layer}.net.{place}"
            for stream, layer in (("image", "ff"), ("text", "ff_context"))
            for i, place in ((1, "0.proj"), (2, "2"))
        }
    )


def _single(block: str) -> Binding:
    attn = f"{block}.attn"
    layers: dict[str, str | tuple[str, ...]] = {
        "kv": (f"{attn}.to_k", f"{attn}.to_v"),
        "q_mlp": (f"{attn}.to_q", f"{block}.proj_mlp"),
        "proj": f"{block}.proj_out",
    }
    return {**_layers(layers), **_norms(attn)}


_BINDINGS: Mapping[str, Callable[[str], Binding]] = {"attn": _attn, "mlp": _mlp, "single": _single}


def _conditioning(spec: ModelSpec) -> Binding:
    """Bind the embedders, and the modulation of all blocks as one matrix.

    The gates of the text in single blocks are left out, see `ConditioningUnit`.
    """
    embedders = ["timestep_embedder", "text_embedder"]
    if spec.embedded_guidance:
        embedders.append("guidance_embedder")
    layers = {
        f"{name}.linear_{i}": f"time_text_embed.{name}.linear_{i}"
        for name in embedders
        for i in (1, 2)
    }
    names, units = block_names(spec), spec.declared_units
    blocks = [names[place.block] for place in spec.unit_places]
    gates = [
        _row(blocks[place.unit], units[place.unit], place.feature.gate)
        for place in spec.features
        if place.feature.stream == "image" or units[place.unit].branch != "single"
    ]
    rest = [
        _row(block, unit, row)
        for block, unit in zip(blocks, units, strict=True)
        for row in unit.rows
    ]
    final = [("norm_out.linear", 1), ("norm_out.linear", 0)]  # diffusers has the scale first
    parts = spec.modulation.in_order(gates=gates, final=final, units=rest)
    rows = {
        f"modulation.{kind}": tuple(
            Slab(f"{layer}.{kind}", chunk * spec.hidden, (chunk + 1) * spec.hidden)
            for layer, chunk in chain.from_iterable(parts)
        )
        for kind in KINDS
    }
    return {**_layers(layers), **rows}


def _row(block: str, unit: Unit, name: str) -> tuple[str, int]:
    """The layer of a row of the modulation table, and its place in the layer."""
    name, _, text = name.partition("_")
    layer = "norm" if unit.branch == "single" else f"norm1{'_context' if text else ''}"
    return f"{block}.{layer}.linear", CHUNKS[unit.branch][name]


def _final(spec: ModelSpec) -> Binding:
    """Bind the final layer, whose rows are (C, p, p); those of `any_size.FinalUnit` (p, p, C)."""
    rows = [
        channel * VALUES_OF_PATCH + pixel
        for pixel in range(VALUES_OF_PATCH)
        for channel in range(spec.channels)
    ]
    return {
        f"linear.{kind}": tuple(Slab(f"proj_out.{kind}", row, row + 1) for row in rows)
        for kind in KINDS
    }


def positions(spec: ModelSpec) -> Positions:
    """The positions of the spec, which has them for every size."""
    assert spec.positions is not None
    return spec.positions


FLUX = Architecture(
    "flux",
    frozenset(
        {
            "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        }
    ),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("FluxPipeline",),
        "FluxTransformer2DModel",
        "",
        spec_from_config,
        state_from_diffusers,
        even_sigmas=True,
    ),
    AUTHORS,
)
