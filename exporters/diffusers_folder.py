"""Reading a DiT from a folder that diffusers saved, without running anything that stands in it.

Accepted: a DiTPipeline folder (``model_index.json`` and ``transformer/``) or its transformer folder alone, with weights in
one ``.safetensors`` file, in several with an index, or in a ``.bin`` file. ``config.json`` is compared with what
DiTTransformer2DModel computes: a setting that is not known, or that would change the arithmetic, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goc_deploy.errors import ModelError, SafetyError
from goc_deploy.exporters.checkpoint import Checkpoint, load_checkpoint
from goc_deploy.schedule import MAX_BLOCKS
from goc_deploy.serde import parse_json
from goc_deploy.spec import ModelSpec

CONFIG, PIPELINE_CONFIG = "config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
SIZES = {  # setting -> what diffusers takes where it is missing
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
REQUIRED = {  # other values would change the arithmetic
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),  # the second is what old files say
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "upcast_attention": (False,),
    "attention_type": ("default",),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "num_vector_embeds": (None,),
    "interpolation_scale": (None, 1, 1.0),
    "use_additional_conditions": (None, False),
}
WITHOUT_EFFECT = ("_diffusers_version", "_name_or_path", "dropout", "norm_num_groups")
FREQUENCY_SHIFT = 1  # diffusers spreads its 128 frequencies over 127 intervals, the public DiT code over 128
DEFAULT_NORM_EPS = 1e-5
_EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


@dataclass(frozen=True)
class DiffusersModel:
    """A model of a folder.

    Attributes:
        checkpoint: tensors under the names of the public DiT layout.
        spec: sizes, as ``config.json`` gives them.
        class_names: one per class, synonyms separated by commas; empty where the folder has none.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    class_names: tuple[str, ...]


def read_dit_folder(path: Path) -> DiffusersModel:
    """Read a DiTPipeline folder or its transformer folder.

    Raises:
        ModelError: not such a folder, a setting that is not supported, weights that are missing, damaged, or not those
            of the configuration.
        SafetyError: an index that names files outside the folder.
    """
    index = _json(path / PIPELINE_CONFIG) if (path / PIPELINE_CONFIG).exists() else {}
    if index and index.get("_class_name") != "DiTPipeline":
        raise ModelError(f"{path} holds a {index.get('_class_name')}; this version exports a DiTPipeline")
    folder = path / "transformer" if index else path
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}; give a .pt, .pth or .safetensors file, or a folder that diffusers saved a DiTPipeline or its transformer to"
        )
    spec = spec_from_config(_json(folder / CONFIG), f"{folder / CONFIG}")
    files, found = _read_weights(folder)
    described = [folder / CONFIG, *([path / PIPELINE_CONFIG] if index else [])]
    state = dit_state(found, spec, folder)
    return DiffusersModel(
        Checkpoint(path, state, "plain", (*described, *files)), spec, _class_names(index, spec, path / PIPELINE_CONFIG)
    )


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: naming the setting that is unknown, not supported or out of range.
    """
    known = {*SIZES, *REQUIRED, *WITHOUT_EFFECT, "out_channels", "norm_eps"}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise ModelError(
            f"{where} has a setting {unknown[0]!r} that this version does not know; it may change the arithmetic"
        )
    for name, allowed in REQUIRED.items():
        if name in config and not any(type(config[name]) is type(value) and config[name] == value for value in allowed):
            raise ModelError(
                f"{where}: {name} is {config[name]!r}, only {' or '.join(map(repr, allowed))} is supported"
            )
    size = {name: config.get(name, default) for name, default in SIZES.items()}
    for name, value in size.items():
        if type(value) is not int or not 1 <= value <= 10**5:
            raise ModelError(f"{where}: {name} must be a whole number from 1 on, got {value!r}")
    channels, patch, norm_eps = size["in_channels"], size["patch_size"], config.get("norm_eps", DEFAULT_NORM_EPS)
    predicted = config.get("out_channels")
    if predicted not in (None, channels, 2 * channels):
        raise ModelError(f"{where}: out_channels is {predicted!r}, expected {channels} or {2 * channels} (with sigma)")
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise ModelError(f"{where}: norm_eps must be a number between 0 and 1, got {norm_eps!r}")
    hidden = size["num_attention_heads"] * size["attention_head_dim"]
    if size["sample_size"] % patch or hidden % 4:
        raise ModelError(f"{where}: sample_size must be a multiple of patch_size, and the width {hidden} of 4")
    if size["num_layers"] > MAX_BLOCKS:
        raise ModelError(f"{where}: num_layers is {size['num_layers']}, at most {MAX_BLOCKS} are supported")
    return ModelSpec(
        depth=size["num_layers"],
        hidden=hidden,
        heads=size["num_attention_heads"],
        mlp_hidden=4 * hidden,
        patch=patch,
        grid=size["sample_size"] // patch,
        channels=channels,
        classes=size["num_embeds_ada_norm"],
        learn_sigma=predicted == 2 * channels,
        frequency_shift=FREQUENCY_SHIFT,
        mlp_norm_eps=norm_eps,
    )


def dit_state(found: Mapping[str, Tensor], spec: ModelSpec, where: Path) -> dict[str, Tensor]:
    """Tensors of a DiTTransformer2DModel under the names of the public DiT layout.

    q, k and v are joined, the position table is computed where diffusers did not save it, and the embedders that
    diffusers keeps in every block are taken once.

    Raises:
        ModelError: listing tensors that are missing or left over, or naming a block whose embedders are its own.
    """
    rest = {name: tensor for name, tensor in found.items() if not _is_repeated_embedder(name, found, where)}
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in rest:
            missing.append(name)
        return rest.pop(name, torch.empty(0))

    table = rest.pop("pos_embed.pos_embed", None)
    state = {"pos_embed": position_table(spec.hidden, spec.grid) if table is None else table}
    state["y_embedder.embedding_table.weight"] = take(
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    )
    for new, old in layer_names(spec.depth).items():
        for kind in ("weight", "bias"):
            state[f"{new}.{kind}"] = take(f"{old}.{kind}")
    for block in range(spec.depth):
        for kind in ("weight", "bias"):
            parts = [take(f"transformer_blocks.{block}.attn1.to_{part}.{kind}") for part in "qkv"]
            same = len({(part.shape[1:], part.dtype) for part in parts}) == 1
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts) if same else parts[0]
    for names, what in ((missing, "missing"), (sorted(rest), "unexpected")):
        if names:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ModelError(f"{where}: the weights are not those of {CONFIG}; {len(names)} tensors {what}: {shown}")
    return state


def layer_names(depth: int) -> dict[str, str]:
    """Layers with a weight and a bias that differ in name only: public DiT layout -> diffusers."""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(depth):
        block, there = f"blocks.{i}", f"transformer_blocks.{i}"
        names[f"{block}.adaLN_modulation.1"] = f"{there}.norm1.linear"
        names[f"{block}.attn.proj"] = f"{there}.attn1.to_out.0"
        names[f"{block}.mlp.fc1"] = f"{there}.ff.net.0.proj"
        names[f"{block}.mlp.fc2"] = f"{there}.ff.net.2"
    return names


def position_table(hidden: int, grid: int) -> Tensor:
    """Sines and cosines of a token's column, then of its row: (1, grid * grid, hidden) float32.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, in two dimensions.
    """
    frequencies = 10_000.0 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (grid, hidden / 2)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def _is_repeated_embedder(name: str, found: Mapping[str, Tensor], where: Path) -> bool:
    match = _EMBEDDER.fullmatch(name)
    if match is None or match[1] == "0":
        return False
    first = found.get(f"transformer_blocks.0.norm1.emb.{match[2]}")
    if first is None or not torch.equal(first, found[name]):
        raise ModelError(
            f"{where}: block {match[1]} has another {match[2]} than block 0; only models whose blocks share their embedders are supported"
        )
    return True


def _read_weights(folder: Path) -> tuple[list[Path], Mapping[str, Tensor]]:
    """The files that hold the weights, and every tensor in them."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if not index.exists():
        present = [p for p in (folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin") if p.exists()]
        if not present:
            raise ModelError(
                f"{folder} has neither {WEIGHTS}.safetensors, its index, nor {WEIGHTS}.bin; download it again"
            )
        return [present[0]], load_checkpoint(present[0]).tensors
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files; download it again")
    tensors: dict[str, Tensor] = {}
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise SafetyError(f"{index} names a file outside its folder: {name!r}; do not use this folder")
        shard = load_checkpoint(folder / name).tensors
        listed = {tensor for tensor, file in places.items() if file == name}
        if shard.keys() != listed:
            odd = sorted(shard.keys() ^ listed)
            raise ModelError(
                f"{folder / name} does not hold the tensors that {index.name} lists for it, see {odd[0]}; download it again"
            )
        tensors |= shard
    return [index, *(folder / name for name in names)], tensors


def _class_names(index: Mapping[str, Any], spec: ModelSpec, where: Path) -> tuple[str, ...]:
    names = index.get("id2label")
    if names is None:
        return ()
    ids = {str(i) for i in range(spec.classes)}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or names.keys() != ids:
        count = len(names) if isinstance(names, dict) else 0
        raise ModelError(
            f"{where}: id2label must name each of the model's {spec.classes} classes by its number, it has {count} entries"
        )
    return tuple(names[str(i)] for i in range(spec.classes))


def _json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as cause:
        raise ModelError(f"{path} cannot be read: {cause.strerror or cause}") from cause
    return parse_json(text, str(path), ModelError)
