"""A FLUX.1 in one file: in the layout of diffusers, or in that of its authors.

A file of the authors joins layers that diffusers has apart. They are read as views of its tensors,
so that nothing is copied except the modulation of the final layer, whose halves are swapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import OtherLayout
from goc_deploy.exporters.architectures.flux_diffusers import (
    AXES,
    VALUES_OF_PATCH,
    FluxConfig,
    block_names,
    described,
    shapes_from_spec,
    spec_of,
)
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.spec import ModelSpec

HEAD = sum(AXES)
FINAL = "final_layer.adaLN_modulation.1"  # shift, then scale; diffusers has the scale first
# Layers of the authors -> the layers of diffusers whose rows each one joins.
OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{
        f"{ours}_in.{layer}": (f"time_text_embed.{theirs}_embedder.linear_{i}",)
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, layer in enumerate(("in_layer", "out_layer"), 1)
    },
    "final_layer.linear": ("proj_out",),
    FINAL: ("norm_out.linear",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
DOUBLE_NORMS = {
    f"{stream}_attn.norm.{part}_norm.scale": f"attn.norm_{added}{part[0]}.weight"
    for stream, added in (("img", ""), ("txt", "added_"))
    for part in ("query", "key")
}
SINGLE_NORMS = {
    f"norm.{part}_norm.scale": f"attn.norm_{part[0]}.weight" for part in ("query", "key")
}


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, in the layout of diffusers.

    Raises:
        ModelError: the sizes cannot be read, or are not those of a text-to-image model.
    """
    try:
        hidden, values = tensors["x_embedder.weight"].shape
        predicted = tensors["proj_out.weight"].shape[0]
        head = tensors["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text = tensors["context_embedder.weight"].shape[1]
        pooled = tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as cause:
        raise ModelError(
            f"the checkpoint looks like a FLUX.1 but its sizes cannot be read: {cause}"
        ) from cause
    if head != HEAD or hidden % HEAD or heads not in (None, hidden // HEAD):
        raise ModelError(
            f"the width is {hidden}, with heads of {head}; heads of {HEAD} are supported in a "
            f"file, because it does not have their axes_dims_rope: leave out `num_heads`, or give "
            "the folder that diffusers saved"
        )
    if values != predicted or values % VALUES_OF_PATCH:
        raise ModelError(
            f"the model reads {values} values per token and predicts {predicted}; models that "
            "start from a picture are not supported"
        )
    doubles, singles = block_counts(tensors)
    return spec_of(
        FluxConfig(
            in_channels=values,
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=hidden // HEAD,
            joint_attention_dim=text,
            pooled_projection_dim=pooled,
            guidance_embeds="time_text_embed.guidance_embedder.linear_1.weight" in tensors,
        )
    )


def block_counts(names: Iterable[str]) -> tuple[int, int]:
    """The number of double blocks, at least one, and of single blocks."""
    found = re.compile(r"(single_)?transformer_blocks\.(\d{1,4})\.")
    places = {(bool(m[1]), int(m[2])) for m in map(found.match, names) if m}
    counts = [
        max([i for kind, i in places if kind == single], default=0) + 1 for single in (False, True)
    ]
    return counts[0], counts[1]


def state_from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of the authors, in the layout of diffusers.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists them by
            their names in the file.
    """
    state: dict[str, Tensor] = {}
    hidden = tensors["img_in.weight"].shape[0]
    for name, tensor in tensors.items():
        parts = _parts(name)
        swapped = name.startswith(FINAL) and len(tensor) == 2 * hidden
        whole = torch.cat([tensor[hidden:], tensor[:hidden]]) if swapped else tensor
        for i, part in enumerate(parts):
            stop = (i + 1) * hidden if i + 1 < len(parts) else None
            state[part] = whole if len(parts) == 1 else whole[i * hidden : stop]
    spec = spec_from_tensors(state, None)
    check_shapes(tensors, _shapes(spec), described(spec))
    return state


def _parts(name: str) -> list[str]:
    """The tensors of diffusers that a tensor of the authors joins; none if the name is unknown."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTER:
        return [f"{part}.{kind}" for part in OUTER[layer]]
    found = re.fullmatch(r"(double|single)_blocks\.(\d{1,4})\.(.+)", name)
    if not found:
        return []
    double, rest = found[1] == "double", found[3]
    block = f"{'' if double else 'single_'}transformer_blocks.{found[2]}"
    norms = DOUBLE_NORMS if double else SINGLE_NORMS
    layer, _, kind = rest.rpartition(".")
    parts = (DOUBLE if double else SINGLE).get(layer, ())
    names = [norms[rest]] if rest in norms else [f"{part}.{kind}" for part in parts]
    return [f"{block}.{part}" for part in names]


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model in the layout of the authors."""
    shapes = shapes_from_spec(spec)
    expected: dict[str, tuple[int, ...]] = {}
    for name in _names(spec):
        parts = [shapes[part] for part in _parts(name) if part in shapes]
        if parts:
            expected[name] = (sum(part[0] for part in parts), *parts[0][1:])
    return expected


def _names(spec: ModelSpec) -> list[str]:
    """All names that the layout of the authors may have for a model."""

    def layers(prefix: str, names: Iterable[str]) -> list[str]:
        return [f"{prefix}{name}.{kind}" for name in names for kind in ("weight", "bias")]

    names = layers("", OUTER)
    for name in block_names(spec):
        single = name.startswith("single")
        block = f"{'single' if single else 'double'}_blocks.{name.rpartition('.')[2]}."
        names += layers(block, SINGLE if single else DOUBLE)
        names += [block + norm for norm in (SINGLE_NORMS if single else DOUBLE_NORMS)]
    return names


AUTHORS = OtherLayout(
    frozenset({"double_blocks.0.img_attn.qkv.weight", "img_in.weight"}), state_from_authors
)
