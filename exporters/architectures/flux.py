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
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import Unit
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES, timestep_features
from goc_deploy.exporters.architectures.flux_diffusers import (
    block_names,
    check_tensors,
    spec_from_config,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.flux_files import AUTHORS, spec_from_tensors
from goc_deploy.exporters.architectures.flux_kinds import (
    CHUNKS,
    attn_of,
    block_kinds,
    caption_examples,
    final_of,
    norms_of,
    positions,
    refuse_fp16,
)
from goc_deploy.exporters.architectures.flux_units import (
    GUIDANCE_SCALE,
    AttnUnit,
    CaptionsUnit,
    Embedder,
    MlpUnit,
    SingleUnit,
)
from goc_deploy.exporters.tracing import (
    KINDS,
    ROWS,
    STEPS,
    Examples,
    Module,
    empty_module,
    layers_of,
)
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

UNITS: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "attn": AttnUnit,
    "mlp": MlpUnit,
    "single": partial(SingleUnit, last=False),
    "last": partial(SingleUnit, last=True),
}


class ConditioningUnit(nn.Module):
    """Timesteps, pooled captions and the guidance scale to the modulation table.

    The gates of a single block are the same for both of its features. They are computed once and
    copied to both places.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.rows = spec.modulation
        branches = [spec.declared_units[place.unit].branch for place in spec.features]
        self.single_gates = branches.index("single")  # before them are the image's other gates
        self.shared = sum(
            branch == "single" and place.feature.stream == "text"
            for branch, place in zip(branches, spec.features, strict=True)
        )
        self.timestep_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden)
        self.text_embedder = Embedder(spec.pooled_channels, spec.hidden)
        if spec.embedded_guidance:
            self.guidance_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden)
        self.modulation = nn.Linear(spec.hidden, (self.rows.count - self.shared) * spec.hidden)

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Everything that the modulation depends on to the table (S, M, K, D).

        Args:
            t: (S,) timesteps, from 1000 to 0.
            pooled: (K, P) float32, pooled captions.
            guidance: (1,) float32, the guidance scale; None if the model does not read it.
        """
        condition = self.timestep_embedder(timestep_features(t))  # (S, D)
        if guidance is not None:
            scale = timestep_features(GUIDANCE_SCALE * guidance)
            condition = condition + self.guidance_embedder(scale)
        both = condition.unsqueeze(1) + self.text_embedder(pooled).unsqueeze(0)  # (S, K, D)
        steps, captions, hidden = both.shape
        rows = self.modulation(F.silu(both).reshape(-1, hidden))
        rows = rows.reshape(steps, captions, -1, hidden)
        gates = self.rows.gates.stop - self.shared  # that were computed
        again = rows[:, :, self.single_gates : self.single_gates + self.shared]
        table = torch.cat([rows[:, :, :gates], again, rows[:, :, gates:]], dim=2)
        return table.transpose(1, 2)


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a FLUX.1, in the order in which they are written.

    Raises:
        UsageError: the precision is fp16.
    """
    refuse_fp16(precision, "FLUX.1")
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
            caption_examples(spec, examples),
            ("text",),
            {"captions": layers_of({"context_embedder": "context_embedder"})},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            traceable(any_size.EmbedUnit),
            (any_size.latents_example(spec, examples), ROWS),
            ("x",),
            {"embed": layers_of({"x_embedder.proj": "x_embedder"})},
        ),
        *block_kinds(spec, examples, traceable, UNITS, _BINDINGS),
        GraphKind(
            "final",
            traceable(any_size.FinalUnit),
            (any_size.grid_example(spec, examples), *examples.modulation("shift", "scale")),
            ("prediction",),
            {"final": final_of(spec)},
        ),
    )


def _condition_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """Pooled captions, and the guidance scale if the model reads it."""
    pooled = examples.normal(2, spec.pooled_channels, dtype=torch.float32)
    guidance = Input("guidance", torch.tensor([3.5]), {})
    return (
        Input("pooled", pooled, {0: "captions"}),
        *((guidance,) if spec.embedded_guidance else ()),
    )


def _mlp(block: str) -> Binding:
    return layers_of(
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
    return {**layers_of(layers), **norms_of(attn)}


_BINDINGS: Mapping[str, Callable[[str], Binding]] = {
    "attn": attn_of,
    "mlp": _mlp,
    "single": _single,
}


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
    return {**layers_of(layers), **rows}


def _row(block: str, unit: Unit, name: str) -> tuple[str, int]:
    """The layer of a row of the modulation table, and its place in the layer."""
    name, _, text = name.partition("_")
    layer = "norm" if unit.branch == "single" else f"norm1{'_context' if text else ''}"
    return f"{block}.{layer}.linear", CHUNKS[unit.branch][name]


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
        spec_from_config,
        state_from_diffusers,
        even_sigmas=True,
    ),
    AUTHORS,
)
