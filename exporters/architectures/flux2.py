"""FLUX.2 klein and dev: the blocks of FLUX.1 without biases, with SwiGLU and one shared modulation.

All double blocks share a modulation of the image and one of the text, and all single blocks another
one. They depend on the timestep and, in FLUX.2-dev, the guidance scale. Tokens of the text have
positions on an axis of their own. Captions are not masked.

Source: the open models of Black Forest Labs, 2025; names and arithmetic are those of diffusers'
``Flux2Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES, timestep_features
from goc_deploy.exporters.architectures.flux2_diffusers import (
    SHARED,
    check_tensors,
    spec_from_config,
    spec_from_tensors,
    state_from_diffusers,
)
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
    swiglu,
)
from goc_deploy.exporters.tracing import ROWS, STEPS, Examples, Module, empty_module, layers_of
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

WEIGHT = ("weight",)
FINAL = "norm_out.linear"


class SwiGluMlp(nn.Module):
    """Two linear layers without biases, with SwiGLU between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, D)."""
        return self.fc2(swiglu(self.fc1(x)))


class ConditioningUnit(nn.Module):
    """Timesteps and the guidance scale to the modulation table, the same for every caption.

    The rows that blocks share are computed once and copied to every unit.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.places = row_places(spec)
        self.timestep_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden, bias=False)
        if spec.embedded_guidance:
            self.guidance_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden, bias=False)
        rows = sum(SHARED.values()) + 2
        self.modulation = nn.Linear(spec.hidden, rows * spec.hidden, bias=False)

    def forward(self, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Timesteps (S,), from 1000 to 0, and the guidance scale (1,) to the table (S, M, 1, D)."""
        condition = self.timestep_embedder(timestep_features(t))  # (S, D)
        if guidance is not None:
            scale = timestep_features(GUIDANCE_SCALE * guidance)
            condition = condition + self.guidance_embedder(scale)
        steps, hidden = condition.shape
        rows = self.modulation(F.silu(condition)).reshape(steps, -1, hidden)
        return rows.index_select(1, torch.tensor(self.places)).unsqueeze(2)


def row_places(spec: ModelSpec) -> list[int]:
    """For each row of the table, its place among the rows that are computed.

    Those are the rows of the layers of ``SHARED``, in their order, then scale and shift of the
    final layer.
    """
    first, starts = 0, {}
    for layer, count in SHARED.items():
        starts[layer], first = first, first + count

    def place(branch: str, name: str) -> int:
        name, _, text = name.partition("_")
        if branch == "single":
            return starts["single_stream_modulation"] + CHUNKS[branch][name]
        return starts[f"double_stream_modulation_{'txt' if text else 'img'}"] + CHUNKS[branch][name]

    units = spec.declared_units
    gates = [place(units[f.unit].branch, f.feature.gate) for f in spec.features]
    rest = [place(unit.branch, name) for unit in units for name in unit.rows]
    parts = spec.modulation.in_order(gates=gates, final=[first + 1, first], units=rest)
    return [row for part in parts for row in part]


UNITS: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "attn": partial(AttnUnit, bias=False),
    "mlp": partial(MlpUnit, make=SwiGluMlp),
    "single": partial(SingleUnit, last=False, gated=True),
    "last": partial(SingleUnit, last=True, gated=True),
}


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a FLUX.2, in the order in which they are written.

    Raises:
        UsageError: the precision is fp16.
    """
    refuse_fp16(precision, "FLUX.2")
    dtype = DTYPES[precision]
    examples = Examples(spec, dtype)

    def traceable(make: Callable[[ModelSpec], Module]) -> Module:
        return empty_module(lambda: make(spec), dtype, examples.generator)

    guidance = Input("guidance", torch.tensor([3.5]), {})
    latents, tokens = (
        any_size.latents_example(spec, examples),
        any_size.grid_example(spec, examples),
    )
    bindings: dict[str, Callable[[str], Binding]] = {
        "attn": partial(attn_of, kinds=WEIGHT),
        "mlp": _mlp,
        "single": partial(_single, hidden=spec.hidden),
    }
    return (
        GraphKind(
            "conditioning",
            traceable(ConditioningUnit),
            (STEPS, *((guidance,) if spec.embedded_guidance else ())),
            ("table",),
            {"conditioning": _conditioning(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            traceable(partial(CaptionsUnit, bias=False)),
            caption_examples(spec, examples),
            ("text",),
            {"captions": layers_of({"context_embedder": "context_embedder"}, WEIGHT)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            traceable(partial(any_size.EmbedUnit, bias=False)),
            (latents, ROWS),
            ("x",),
            {"embed": layers_of({"x_embedder.proj": "x_embedder"}, WEIGHT)},
        ),
        *block_kinds(spec, examples, traceable, UNITS, bindings),
        GraphKind(
            "final",
            traceable(partial(any_size.FinalUnit, bias=False)),
            (tokens, *examples.modulation("shift", "scale")),
            ("prediction",),
            {"final": final_of(spec, WEIGHT)},
        ),
    )


def _conditioning(spec: ModelSpec) -> Binding:
    embedders = ["timestep_embedder"] + ["guidance_embedder"] * spec.embedded_guidance
    layers: dict[str, str | tuple[str, ...]] = {
        f"{name}.linear_{i}": f"time_guidance_embed.{name}.linear_{i}"
        for name in embedders
        for i in (1, 2)
    }
    layers["modulation"] = (*(f"{layer}.linear" for layer in SHARED), FINAL)
    return layers_of(layers, WEIGHT)


def _mlp(block: str) -> Binding:
    names = {
        f"{stream}.fc{i}": f"{block}.{layer}.linear_{place}"
        for stream, layer in (("image", "ff"), ("text", "ff_context"))
        for i, place in ((1, "in"), (2, "out"))
    }
    return layers_of(names, WEIGHT)


def _single(block: str, *, hidden: int) -> Binding:
    """Bind a single block, whose first layer has the rows of q, k, v and the MLP."""
    joined = f"{block}.attn.to_qkv_mlp_proj.weight"
    return {
        "kv.weight": (Slab(joined, hidden, 3 * hidden),),
        "q_mlp.weight": (Slab(joined, 0, hidden), Slab(joined, 3 * hidden)),
        "proj.weight": (Slab(f"{block}.attn.to_out.weight"),),
        **norms_of(f"{block}.attn"),
    }


FLUX2 = Architecture(
    "flux2",
    frozenset({f"{layer}.linear.weight" for layer in SHARED}),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        "Flux2Transformer2DModel",
        spec_from_config,
        state_from_diffusers,
        even_sigmas=True,
        fitted_shift=True,
    ),
)
