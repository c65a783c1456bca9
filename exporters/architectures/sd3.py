"""Stable Diffusion 3 and 3.5 as exported graphs: joint attention of image and text (MMDiT).

The attention branch of a block reads both streams and adds a feature to each; so does the MLP
branch, with weights of its own for each. Dual blocks (Stable Diffusion 3.5 Medium) have a second
attention, of the image alone, which reads the tokens before the block and adds a feature of its
own. The last block leaves the text as it is, so its text only gives keys and values. All modulation
depends on the timestep and the pooled embedding of the caption, and is computed once per request.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
ICML 2024, section 4; names and arithmetic are those of diffusers' ``SD3Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain

from torch import nn

from goc_deploy.blocks import TEXT_FEATURE, Unit
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder, OtherLayout
from goc_deploy.exporters.architectures.joint import (
    CAPTION_ROWS,
    CaptionsUnit,
    ConditioningUnit,
    captions_example,
    pooled_example,
    text_example,
)
from goc_deploy.exporters.architectures.sd3_layout import check_tensors, state_from_authors
from goc_deploy.exporters.architectures.sd3_spec import (
    FAMILY,
    spec_from_config,
    spec_from_tensors,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.sd3_units import module_of, outputs_of
from goc_deploy.exporters.tracing import KINDS, ROWS, STEPS, Examples, empty_module, layers_of
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Slab
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions

NORM, CONTEXT = "norm1.linear", "norm1_context.linear"
# Branch -> name of a row of the table -> the layer of the block, and its chunk of D rows.
CHUNKS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "attn": {
        **{name: (NORM, i) for i, name in enumerate(("shift", "scale", "gate"))},
        **{name: (NORM, 6 + i) for i, name in enumerate(("shift_2", "scale_2", "gate_2"))},
        **{name: (CONTEXT, i) for i, name in enumerate(("shift_text", "scale_text", "gate_text"))},
    },
    "mlp": {
        **{name: (NORM, 3 + i) for i, name in enumerate(("shift", "scale", "gate"))},
        **{
            name: (CONTEXT, 3 + i)
            for i, name in enumerate(("shift_text", "scale_text", "gate_text"))
        },
    },
}
# The modulation layers without gates, of the last context and of the final layer.
SCALE_FIRST = {"scale": 0, "shift": 1, "scale_text": 0, "shift_text": 1}
# Branch -> layer of the module -> the layers of the block whose rows it joins.
LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attn": {
        "image.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "image.norm_q": ("attn.norm_q",),
        "image.norm_k": ("attn.norm_k",),
        "image_proj": ("attn.to_out.0",),
        "second.linear": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "second.norm_q": ("attn2.norm_q",),
        "second.norm_k": ("attn2.norm_k",),
        "second_proj": ("attn2.to_out.0",),
        "text.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "text.norm_q": ("attn.norm_added_q",),
        "text.norm_k": ("attn.norm_added_k",),
        "text_proj": ("attn.to_add_out",),
    },
    "mlp": {
        **{f"{name}.fc1": ("ff.net.0.proj",) for name in ("image", "mlp")},
        **{f"{name}.fc2": ("ff.net.2",) for name in ("image", "mlp")},
        "text.fc1": ("ff_context.net.0.proj",),
        "text.fc2": ("ff_context.net.2",),
    },
}


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a Stable Diffusion 3, in the order in which they are written."""
    dtype = DTYPES[precision]
    examples = Examples(spec, dtype)

    def traceable(make: Callable[[], nn.Module]) -> nn.Module:
        return empty_module(make, dtype, examples.generator)

    return (
        GraphKind(
            "conditioning",
            traceable(partial(ConditioningUnit, spec)),
            (STEPS, pooled_example(spec, examples)),
            ("table",),
            {"conditioning": _conditioning(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            traceable(partial(CaptionsUnit, spec)),
            (captions_example(spec, examples), CAPTION_ROWS),
            ("text",),
            {"captions": layers_of({"linear": "context_embedder"})},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            traceable(partial(any_size.EmbedUnit, spec)),
            (
                any_size.latents_example(spec, examples),
                ROWS,
                any_size.table_example(spec, examples),
            ),
            ("x",),
            {"embed": layers_of({"x_embedder.proj": "pos_embed.proj"})},
        ),
        *_unit_kinds(spec, examples, traceable),
        GraphKind(
            "final",
            traceable(partial(any_size.FinalUnit, spec)),
            (any_size.grid_example(spec, examples), *examples.modulation("shift", "scale")),
            ("prediction",),
            {"final": layers_of({"linear": "proj_out"})},
        ),
    )


def _unit_kinds(
    spec: ModelSpec, examples: Examples, traceable: Callable[[Callable[[], nn.Module]], nn.Module]
) -> Iterator[GraphKind]:
    """The graphs of the units, one kind for each declaration."""
    places = list(zip(spec.unit_names, spec.unit_places, spec.declared_units, strict=True))
    for unit in dict.fromkeys(spec.declared_units):
        text = (text_example(spec, examples),) if "text" in unit.reads else ()
        gates = (feature.gate for feature in unit.features)
        module = traceable(partial(module_of, spec, unit))
        yield GraphKind(
            f"{unit.branch} with {len(unit.features)} features",
            module,
            (examples.tokens(), *text, *examples.modulation(*unit.rows, *gates)),
            outputs_of(unit),
            {
                name: _unit(unit, module, f"transformer_blocks.{place.block}")
                for name, place, own in places
                if own == unit
            },
        )


def _unit(unit: Unit, module: nn.Module, block: str) -> Binding:
    """Bind the parameters of a unit's module to the tensors of a block."""
    binding = {}
    for name, _ in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        layer, kind = (layer, kind) if kind in KINDS else (name, "weight")  # norms are parameters
        parts = LAYERS[unit.branch][layer]
        if layer == "text.linear" and TEXT_FEATURE not in unit.features:
            parts = parts[1:]  # no queries
        binding[name] = tuple(Slab(f"{block}.{part}.{kind}") for part in parts)
    return binding


def _conditioning(spec: ModelSpec) -> Binding:
    """Bind the embedders, and the modulation layers of all blocks as one matrix."""
    rows = [(number, row) for number, unit in enumerate(spec.declared_units) for row in unit.rows]
    gates = [(place.unit, place.feature.gate) for place in spec.features]
    parts = spec.modulation.in_order(
        gates=[_chunk(spec, *gate) for gate in gates],
        final=[("norm_out.linear", SCALE_FIRST[row]) for row in SHIFT_AND_SCALE],
        units=[_chunk(spec, *row) for row in rows],
    )
    embedder = "time_text_embed.{}_embedder.linear_{}"
    binding = {
        **layers_of(
            {f"t_embedder.mlp.{2 * i}": embedder.format("timestep", i + 1) for i in (0, 1)}
        ),
        **layers_of({f"pooled_embedder.{2 * i}": embedder.format("text", i + 1) for i in (0, 1)}),
    }
    for kind in KINDS:
        binding[f"modulation.{kind}"] = tuple(
            Slab(f"{layer}.{kind}", chunk * spec.hidden, (chunk + 1) * spec.hidden)
            for layer, chunk in chain.from_iterable(parts)
        )
    return binding


def _chunk(spec: ModelSpec, unit: int, row: str) -> tuple[str, int]:
    """The modulation layer of a unit's row, and the row's chunk of it."""
    place = spec.unit_places[unit]
    layer, chunk = CHUNKS[place.branch][row]
    if layer == CONTEXT and place.block == spec.depth - 1:
        chunk = SCALE_FIRST[row]
    return f"transformer_blocks.{place.block}.{layer}", chunk


def positions(spec: ModelSpec) -> Positions:
    """The positions of the spec, which has them for every size."""
    assert spec.positions is not None
    return spec.positions


SD3 = Architecture(
    FAMILY,
    frozenset(
        {
            "pos_embed.proj.weight",
            "context_embedder.weight",
            "transformer_blocks.0.norm1_context.linear.weight",
        }
    ),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("StableDiffusion3Pipeline",),
        "SD3Transformer2DModel",
        "",
        spec_from_config,
        state_from_diffusers,
    ),
    OtherLayout(
        frozenset({"pos_embed", "joint_blocks.0.context_block.attn.qkv.weight"}),
        state_from_authors,
    ),
)
