"""Qwen-Image as exported graphs: blocks that change the tokens of the image and of the caption.

The timestep embedding and all modulation are hoisted out of the step loop. They do not depend on
the caption, so the modulation table has one row. The norm and the projection of the caption are
computed once per request. Each stream has projections of its own, and both share the attention,
in the order text, image. Padding of a caption is masked. The last block changes only the image:
its queries of the text, and what follows them, are left out.

Source: Qwen Team, "Qwen-Image Technical Report", 2025, section 2; names and arithmetic are those of
diffusers' ``QwenImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from goc_deploy.conditions.captions import MASKED
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit import MlpUnit
from goc_deploy.exporters.architectures.joint import captions_example, text_example
from goc_deploy.exporters.architectures.qwen_diffusers import (
    ROWS,
    check_tensors,
    spec_from_config,
    spec_from_tensors,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.qwen_units import (
    CaptionsUnit,
    ConditioningUnit,
    FinalUnit,
    JointAttnUnit,
    JointMlpUnit,
    LastAttnUnit,
)
from goc_deploy.exporters.tracing import (
    KINDS,
    SOME_TOKENS,
    STEPS,
    Examples,
    Module,
    empty_module,
    layers_of,
)
from goc_deploy.exporters.tracing import ROWS as BATCH_ROWS
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions

CHUNKS = (*SHIFT_AND_SCALE, "gate")  # of each half of a modulation layer
IMAGE, JOINT = ("x_out", "feature"), ("x_out", "text_out", "feature", "feature_text")


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a Qwen-Image, in the order in which they are written.

    Raises:
        ModelError: the precision is fp16.
    """
    if precision == "fp16":
        raise ModelError(
            "the text stream of a Qwen-Image overflows in fp16; use `precision=bf16` or fp32"
        )
    dtype = DTYPES[precision]
    examples = Examples(spec, dtype)

    def traceable(make: Callable[[ModelSpec], Module]) -> Module:
        return empty_module(lambda: make(spec), dtype, examples.generator)

    streams = (examples.tokens(), text_example(spec, examples))
    rows = examples.modulation(*ROWS, "gate")
    attention = (*_caption_examples(spec), *_angles(spec))
    gate_text = examples.modulation("gate_text")
    joint, last = range(spec.depth - 1), f"block_{spec.depth - 1:02d}"
    end = f"transformer_blocks.{spec.depth - 1}"
    kinds = [
        GraphKind(
            "conditioning",
            traceable(ConditioningUnit),
            (STEPS,),
            ("table",),
            {"conditioning": _conditioning(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            traceable(CaptionsUnit),
            (captions_example(spec, examples), _CAPTION_ROWS),
            ("text",),
            {"captions": {**layers_of({"txt_in": "txt_in"}), "norm": (Slab("txt_norm.weight"),)}},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            traceable(any_size.EmbedUnit),
            (any_size.latents_example(spec, examples), BATCH_ROWS),
            ("x",),
            {"embed": layers_of({"x_embedder.proj": "img_in"})},
        ),
        GraphKind(
            "attn",
            traceable(JointAttnUnit),
            (*streams, *attention, *rows, *gate_text),
            JOINT,
            {f"block_{i:02d}_attn": _attn(f"transformer_blocks.{i}.attn") for i in joint},
        ),
        GraphKind(
            "mlp",
            traceable(JointMlpUnit),
            (*streams, *rows, *gate_text),
            JOINT,
            {f"block_{i:02d}_mlp": _mlps(f"transformer_blocks.{i}") for i in joint},
        ),
        GraphKind(
            "last attn",
            traceable(LastAttnUnit),
            (*streams, *attention, *rows),
            IMAGE,
            {f"{last}_attn": _last_attn(f"{end}.attn")},
        ),
        GraphKind(
            "last mlp",
            traceable(MlpUnit),
            (streams[0], *examples.modulation(*SHIFT_AND_SCALE, "gate")),
            IMAGE,
            {f"{last}_mlp": layers_of(_mlp_names("mlp", f"{end}.img_mlp"))},
        ),
        GraphKind(
            "final",
            traceable(FinalUnit),
            (any_size.grid_example(spec, examples), *examples.modulation(*SHIFT_AND_SCALE)),
            ("prediction",),
            {"final": layers_of({"linear": "proj_out"})},
        ),
    ]
    return tuple(kind for kind in kinds if kind.copies)


_CAPTION_ROWS = Input("caption_rows", torch.tensor([1, 0]), {0: "batch"})


def _caption_examples(spec: ModelSpec) -> tuple[Input, ...]:
    """The mask of two captions, of which one is short, and the caption of each row."""
    length = spec.caption_tokens
    bias = MASKED * (torch.arange(length) >= torch.tensor([[length // 2], [length]])).float()
    return Input("bias", bias, {0: "captions"}), _CAPTION_ROWS


def _angles(spec: ModelSpec) -> tuple[Input, ...]:
    """Angles of the example tokens of the image, and of the text."""
    speeds = torch.linspace(1, 0.1, spec.hidden // spec.heads // 2)
    image = torch.linspace(-1, 2, SOME_TOKENS)[:, None] * speeds
    text = torch.linspace(2, 5, spec.caption_tokens)[:, None] * speeds
    return (
        Input("cos", image.cos(), {0: "tokens"}),
        Input("sin", image.sin(), {0: "tokens"}),
        Input("text_cos", text.cos(), {}),
        Input("text_sin", text.sin(), {}),
    )


def _conditioning(spec: ModelSpec) -> Binding:
    """Bind the embedder, and all modulation layers as one, in the order of the table."""
    embedder = "time_text_embed.timestep_embedder"
    names = {f"t_embedder.mlp.{i}": f"{embedder}.linear_{1 + i // 2}" for i in (0, 2)}
    places, declared, width = spec.unit_places, spec.declared_units, spec.hidden

    def rows_of(unit: int, name: str) -> tuple[str, int]:
        """The layer that computes a row of the table, and its place among those of the layer."""
        layer = "txt_mod" if name.endswith("_text") else "img_mod"
        half = len(CHUNKS) if places[unit].branch == "mlp" else 0
        block = f"transformer_blocks.{places[unit].block}"
        return f"{block}.{layer}.1", half + CHUNKS.index(name.removesuffix("_text"))

    gates, final, units = spec.modulation.in_order(
        gates=[rows_of(place.unit, place.feature.gate) for place in spec.features],
        final=[("norm_out.linear", 1), ("norm_out.linear", 0)],  # its scale comes first
        units=[rows_of(i, name) for i, unit in enumerate(declared) for name in unit.rows],
    )
    modulation = {
        f"modulation.{kind}": tuple(
            Slab(f"{layer}.{kind}", chunk * width, (chunk + 1) * width)
            for layer, chunk in (*gates, *final, *units)
        )
        for kind in KINDS
    }
    return {**layers_of(names), **modulation}


def _attn(attn: str) -> Binding:
    return {
        **layers_of({"proj": f"{attn}.to_out.0", "proj_text": f"{attn}.to_add_out"}),
        **layers_of({"qkv": tuple(f"{attn}.to_{part}" for part in "qkv")}),
        **layers_of({"qkv_text": tuple(f"{attn}.add_{part}_proj" for part in "qkv")}),
        **{f"norm_{part}": (Slab(f"{attn}.norm_{part}.weight"),) for part in "qk"},
        **{f"norm_{part}_text": (Slab(f"{attn}.norm_added_{part}.weight"),) for part in "qk"},
    }


def _last_attn(attn: str) -> Binding:
    """The tensors of a block that drops its queries of the text."""
    return {
        **layers_of({"proj": f"{attn}.to_out.0"}),
        **layers_of({"qkv": tuple(f"{attn}.to_{part}" for part in "qkv")}),
        **layers_of({"kv_text": tuple(f"{attn}.add_{part}_proj" for part in "kv")}),
        **{f"norm_{part}": (Slab(f"{attn}.norm_{part}.weight"),) for part in "qk"},
        "norm_k_text": (Slab(f"{attn}.norm_added_k.weight"),),
    }


def _mlp_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.fc1": f"{theirs}.net.0.proj", f"{ours}.fc2": f"{theirs}.net.2"}


def _mlps(block: str) -> Binding:
    names = _mlp_names("mlp", f"{block}.img_mlp") | _mlp_names("mlp_text", f"{block}.txt_mlp")
    return layers_of(names)


def positions(spec: ModelSpec) -> Positions:
    """The positions of the spec, which has them for every size."""
    assert spec.positions is not None
    return spec.positions


QWEN_IMAGE = Architecture(
    "qwen-image",
    frozenset({"img_in.weight", "txt_norm.weight", "transformer_blocks.0.txt_mod.1.weight"}),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("QwenImagePipeline",),
        "QwenImageTransformer2DModel",
        "",
        spec_from_config,
        state_from_diffusers,
        even_sigmas=True,
    ),
)
