"""Z-Image as exported graphs: blocks that see the image and its caption as one sequence.

The modulation depends on the time only and has scales and gates; the caption has a few blocks of
its own, without modulation, which are computed once per request. The image has a few blocks before
it meets the caption.

Source: Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream
Diffusion Transformer", 2025; names and arithmetic are those of diffusers'
``ZImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.joint_kinds import captions_example, text_example
from goc_deploy.exporters.architectures.z_image_diffusers import (
    KEY,
    check_tensors,
    spec_from_config,
    spec_from_tensors,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.z_image_units import (
    AttnUnit,
    CaptionsUnit,
    ConditioningUnit,
    EmbedUnit,
    FinalUnit,
    MlpUnit,
)
from goc_deploy.exporters.tracing import (
    KINDS,
    ROWS,
    SOME_TOKENS,
    STEPS,
    Examples,
    Module,
    empty_module,
)
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a Z-Image, in the order in which they are written."""
    dtype, refiners, last = DTYPES[precision], spec.blocks[0].count, spec.depth - 1
    examples = Examples(spec, dtype)
    captions, *of_captions, text = _text_examples(spec, examples)
    alone = (examples.tokens(), *examples.modulation("scale", "gate"))
    gate_text, turns = examples.modulation("gate_text"), _angles(spec)
    image, joint = ("x_out", "feature"), ("x_out", "text_out", "feature", "feature_text")
    blocks = [f"noise_refiner.{i}" for i in range(refiners)]
    blocks += [f"layers.{i}" for i in range(spec.depth - refiners)]

    def kind(
        name: str,
        make: Callable[[ModelSpec], Module],
        inputs: Sequence[Input],
        outputs: tuple[str, ...],
        copies: Mapping[str, Binding],
    ) -> GraphKind:
        module = empty_module(lambda: make(spec), dtype, examples.generator)
        once = name in ("conditioning", "captions")
        return GraphKind(name, module, tuple(inputs), outputs, copies, weights_are_inputs=once)

    def attn(*places: int) -> dict[str, Binding]:
        return {f"block_{i:02d}_attn": _attn("", blocks[i]) for i in places}

    def mlp(*places: int) -> dict[str, Binding]:
        return {f"block_{i:02d}_mlp": _mlp("", blocks[i]) for i in places}

    first, middle = range(refiners), range(refiners, last)
    latents = any_size.latents_example(spec, examples)
    tokens = (any_size.grid_example(spec, examples), *examples.modulation("shift", "scale"))
    embed, final = f"all_x_embedder.{KEY}", f"all_final_layer.{KEY}.linear"
    kinds = (
        kind("conditioning", ConditioningUnit, [STEPS], ("table",), _conditioning(spec, blocks)),
        kind(
            "captions",
            partial(CaptionsUnit, blocks=refiners),
            [captions, *of_captions],
            ("text",),
            _captions(refiners),
        ),
        kind("embed", EmbedUnit, [latents, ROWS], ("x",), {"embed": _layer("embed", embed)}),
        kind("attn", AttnUnit, [*alone, *turns], image, attn(*first)),
        kind(
            "joint attn",
            AttnUnit,
            [*alone, *turns, text, *of_captions, *gate_text],
            joint,
            attn(*middle),
        ),
        kind(
            "last attn",
            partial(AttnUnit, last=True),
            [*alone, *turns, text, *of_captions],
            image,
            attn(last),
        ),
        kind("mlp", MlpUnit, alone, image, mlp(*first, last)),
        kind("joint mlp", MlpUnit, [*alone, text, *gate_text], joint, mlp(*middle)),
        kind("final", FinalUnit, tokens, ("prediction",), {"final": _layer("linear", final)}),
    )
    return tuple(kind for kind in kinds if kind.copies)


def _text_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """``captions``, their mask, the caption of each row, and ``text``."""
    length = spec.caption_tokens
    bias = MASKED * (torch.arange(length) >= torch.tensor([[length // 3], [length]])).float()
    return (
        captions_example(spec, examples),
        Input("bias", bias, {0: "captions"}),
        Input("caption_rows", torch.tensor([1, 0]), {0: "batch"}),
        text_example(spec, examples),
    )


def _angles(spec: ModelSpec) -> tuple[Input, ...]:
    """``cos`` and ``sin`` of the example tokens."""
    speeds = torch.linspace(1, 0.1, spec.hidden // spec.heads // 2)
    angles = torch.linspace(0, 3, SOME_TOKENS)[:, None] * speeds
    return (
        Input("cos", angles.cos(), {0: "tokens"}),
        Input("sin", angles.sin(), {0: "tokens"}),
    )


def _layer(ours: str, theirs: str) -> dict[str, tuple[Slab, ...]]:
    return {f"{ours}.{kind}": (Slab(f"{theirs}.{kind}"),) for kind in KINDS}


def _conditioning(spec: ModelSpec, blocks: Sequence[str]) -> dict[str, Binding]:
    """Bind the embedder, the modulation of all blocks as one layer, and that of the last layer."""
    places, width = spec.unit_places, spec.hidden

    def rows_of(unit: int, chunk: int) -> tuple[str, int]:
        half = 2 if places[unit].branch == "mlp" else 0
        return f"{blocks[places[unit].block]}.adaLN_modulation.0", half + chunk

    gates, _, scales = spec.modulation.in_order(
        gates=[rows_of(place.unit, 1) for place in spec.features],
        final=[],
        units=[rows_of(unit, 0) for unit in range(spec.units)],
    )
    modulation = {
        f"modulation.{kind}": tuple(
            Slab(f"{layer}.{kind}", chunk * width, (chunk + 1) * width)
            for layer, chunk in (*gates, *scales)
        )
        for kind in KINDS
    }
    embedder = {**_layer("fc1", "t_embedder.mlp.0"), **_layer("fc2", "t_embedder.mlp.2")}
    final = _layer("final", f"all_final_layer.{KEY}.adaLN_modulation.1")
    return {"conditioning": {**embedder, **modulation, **final}}


def _captions(refiners: int) -> dict[str, Binding]:
    binding = {
        "norm": (Slab("cap_embedder.0.weight"),),
        "pad_token": (Slab("cap_pad_token"),),
        **_layer("embed", "cap_embedder.1"),
    }
    for i in range(refiners):
        binding |= _attn(f"attn.{i}.", f"context_refiner.{i}")
        binding |= _mlp(f"mlp.{i}.", f"context_refiner.{i}")
    return {"captions": binding}


def _attn(ours: str, block: str) -> dict[str, tuple[Slab, ...]]:
    attn = f"{block}.attention"
    return {
        f"{ours}qkv.weight": tuple(Slab(f"{attn}.to_{part}.weight") for part in "qkv"),
        f"{ours}proj.weight": (Slab(f"{attn}.to_out.0.weight"),),
        **{f"{ours}norm{i}": (Slab(f"{block}.attention_norm{i}.weight"),) for i in (1, 2)},
        **{f"{ours}norm_{part}": (Slab(f"{attn}.norm_{part}.weight"),) for part in "qk"},
    }


def _mlp(ours: str, block: str) -> dict[str, tuple[Slab, ...]]:
    return {
        **{f"{ours}w{i}.weight": (Slab(f"{block}.feed_forward.w{i}.weight"),) for i in (1, 2, 3)},
        **{f"{ours}norm{i}": (Slab(f"{block}.ffn_norm{i}.weight"),) for i in (1, 2)},
    }


def positions(spec: ModelSpec) -> Positions:
    """The positions of the spec, which has them for every size."""
    assert spec.positions is not None
    return spec.positions


Z_IMAGE = Architecture(
    "z-image",
    frozenset({"cap_pad_token", "x_pad_token", f"all_x_embedder.{KEY}.weight"}),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("ZImagePipeline",),
        "ZImageTransformer2DModel",
        spec_from_config,
        state_from_diffusers,
        even_sigmas=True,
    ),
)
