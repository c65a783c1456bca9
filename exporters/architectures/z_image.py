"""Z-Image as exported graphs: blocks that see the image and its caption as one sequence.

The modulation depends on the time only and has scales and gates; the caption has a few blocks of
its own, without modulation, which are computed once per request. The image has a few blocks before
it meets the caption. A caption is padded to a multiple of 32 tokens with a learned token, and the
image stands behind it on the first axis of positions. Attention sees only differences of positions,
so here the image is at 0 and the caption before it: captions of different lengths share a batch.

Source: Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream
Diffusion Transformer", 2025; names and arithmetic are those of diffusers'
``ZImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from torch import Tensor, nn

from goc_deploy.blocks import IMAGE_FEATURE, MAX_BLOCKS, STREAMS, Unit, UnitPlace
from goc_deploy.conditions.captions import MASKED
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import (
    Architecture,
    DiffusersFolder,
    own_positions,
)
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES, timestep_features
from goc_deploy.exporters.architectures.joint import attend
from goc_deploy.exporters.architectures.joint_family import BOTH, JointFamily
from goc_deploy.exporters.architectures.joint_kinds import Layers, MakeModule, Row
from goc_deploy.exporters.architectures.normed_units import EPSILON, Branch, NormedUnit
from goc_deploy.exporters.architectures.reading import (
    PATCH,
    VALUES_OF_PATCH,
    check_heads,
    count_blocks,
    image_spec,
    reading_sizes,
)
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.spec import ModelSpec, Positions

TOKENS, GRID = 512, (64, 64)  # of a caption, and of an image of 1024x1024 pixels
VAE_CHANNELS = 16  # of the public model
MULTIPLE = 32  # of the tokens of a padded caption
CONDITION, INNER = 256, 1024  # widths of the time embedding
TRAIN_STEPS = 1000
KEY = f"{PATCH}-1"  # of the embedding and the final layer, by the sizes of their patches
BRANCHES = ("attn", "mlp")
ALONE = tuple(Unit(branch, ("scale",)) for branch in BRANCHES)
JOINT = tuple(Unit(branch, ("scale",), BOTH, STREAMS) for branch in BRANCHES)
LAST = (Unit("attn", ("scale",), (IMAGE_FEATURE,), STREAMS), ALONE[1])
CHUNKS = {"attn": 0, "mlp": 2}  # of a block's modulation: the scale of a branch, then its gate
LAYERS: Mapping[str, Layers] = {
    "attn": {
        "layer.heads.qkv": tuple(f"attention.to_{part}" for part in "qkv"),
        "layer.proj": ("attention.to_out.0",),
        **{f"norm{i}": (f"attention_norm{i}.weight",) for i in (1, 2)},
        **{f"layer.heads.norm_{part}": (f"attention.norm_{part}.weight",) for part in "qk"},
    },
    "mlp": {
        "layer.fc1": ("feed_forward.w1", "feed_forward.w3"),
        "layer.fc2": ("feed_forward.w2",),
        **{f"norm{i}": (f"ffn_norm{i}.weight",) for i in (1, 2)},
    },
}


class ZImageConfig(Struct, frozen=True, kw_only=True):
    """The settings of a ZImageTransformer2DModel that are read, with the defaults of diffusers."""

    in_channels: Setting = 16
    dim: Setting = 3840
    n_layers: Setting = 30
    n_refiner_layers: Setting = 2
    n_heads: Setting = 30
    cap_feat_dim: Setting = 2560
    rope_theta: Annotated[float, Meta(gt=1)] = 256.0
    axes_dims: Annotated[tuple[Setting, ...], Meta(min_length=3, max_length=3)] = (32, 48, 48)
    n_kv_heads: Setting = 30


SETTINGS = Settings(
    ZImageConfig,
    required={
        "_class_name": ("ZImageTransformer2DModel",),
        "all_patch_size": ([PATCH],),
        "all_f_patch_size": ([1],),
        "norm_eps": (1e-5,),
        "qk_norm": (True,),
        "siglip_feat_dim": (None,),  # Omni reads pictures too
        "t_scale": (1000.0,),
    },
    without_effect=("_diffusers_version", "_name_or_path", "axes_lens"),
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    return spec_of(SETTINGS.read(config, where), where)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    with reading_sizes("Z-Image"):
        dim, of_patch = tensors[f"all_x_embedder.{KEY}.weight"].shape
        (head,) = tensors["layers.0.attention.norm_q.weight"].shape
        text = tensors["cap_embedder.1.weight"].shape[1]
    known = head > 0 and head % 16 == 0
    check_heads(dim, head, heads, known=known, supported="a multiple of 16")
    side = 3 * head // 8  # values of a head for rows, and for columns, as in the public model
    config = ZImageConfig(
        in_channels=of_patch // VALUES_OF_PATCH,
        dim=dim,
        n_layers=count_blocks(tensors, "layers"),
        n_refiner_layers=count_blocks(tensors, "noise_refiner"),
        n_heads=dim // head,
        n_kv_heads=dim // head,
        cap_feat_dim=text,
        axes_dims=(head - 2 * side, side, side),
    )
    return spec_of(config, "the checkpoint")


def spec_of(read: ZImageConfig, where: str) -> ModelSpec:
    """The model of some settings, for images of 1024x1024 pixels.

    Raises:
        ModelError: the settings do not fit together; the message names them.
    """
    heads, widths, depth = read.n_heads, read.axes_dims, read.n_refiner_layers + read.n_layers
    if heads * sum(widths) != read.dim or any(width % 2 for width in widths):
        raise ModelError(
            f"{where}: axes_dims is {list(widths)}; they must be even, and their sum times n_heads "
            f"({heads}) must be dim, {read.dim}"
        )
    if read.n_kv_heads != heads or not CONDITION <= read.dim <= MAX_WIDTH or depth > MAX_BLOCKS:
        raise ModelError(
            f"{where}: n_kv_heads is {read.n_kv_heads}, expected n_heads, {heads}; dim is "
            f"{read.dim}, expected {CONDITION} to {MAX_WIDTH}; there are {depth} blocks, at most "
            f"{MAX_BLOCKS} are supported"
        )
    spec = image_spec(
        "z-image",
        [*[ALONE] * read.n_refiner_layers, *[JOINT] * (read.n_layers - 1), LAST],
        heads=heads,
        head=sum(widths),
        mlp_hidden=int(read.dim / 3 * 8),
        channels=read.in_channels,
        grid=GRID,
    )
    return replace(
        spec,
        caption_channels=read.cap_feat_dim,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=widths, theta=read.rope_theta),
        vae_scale=spec.vae_scale if read.in_channels == VAE_CHANNELS else 1,
        token_multiple=MULTIPLE,
    )


@lru_cache(maxsize=64)
def block_names(spec: ModelSpec) -> tuple[str, ...]:
    """The name of each block, in the order of execution."""
    alone, joint = range(spec.blocks[0].count), range(spec.depth - spec.blocks[0].count)
    return (*(f"noise_refiner.{i}" for i in alone), *(f"layers.{i}" for i in joint))


def _layers(spec: ModelSpec) -> dict[str, Layers]:
    refined = {
        f"{branch}.{i}.{layer}": tuple(f"context_refiner.{i}.{part}" for part in parts)
        for i in range(spec.blocks[0].count)
        for branch, layers in LAYERS.items()
        for layer, parts in layers.items()
    }
    return {
        "conditioning": {
            "fc1": ("t_embedder.mlp.0",),
            "fc2": ("t_embedder.mlp.2",),
            "final": (f"all_final_layer.{KEY}.adaLN_modulation.1",),
        },
        "captions": {
            "norm": ("cap_embedder.0.weight",),
            "pad_token": ("cap_pad_token",),
            "embed": ("cap_embedder.1",),
            **refined,
        },
        "embed": {"x_embedder.proj": (f"all_x_embedder.{KEY}",)},
        **{
            branch: {f"branch.{layer}": parts for layer, parts in layers.items()}
            for branch, layers in LAYERS.items()
        },
        "final": {"linear": (f"all_final_layer.{KEY}.linear",)},
    }


def _row(spec: ModelSpec, place: UnitPlace, name: str) -> Row:
    chunk = CHUNKS[place.branch] + (name != "scale")
    return f"{block_names(spec)[place.block]}.adaLN_modulation.0", chunk


def padded_captions(spec: ModelSpec, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask of captions (K, L) to that of padded captions, and the angles of their positions."""
    tokens = (bias > MASKED / 2).float().sum(1, keepdim=True)  # (K, 1)
    count = MULTIPLE * ((tokens + MULTIPLE - 1) / MULTIPLE).to(torch.int64).float()
    places = torch.arange(bias.shape[1]) - count
    first, *others = own_positions(spec).widths
    speeds = own_positions(spec).theta ** (-torch.arange(0, first, 2) / first)
    speeds = torch.cat([speeds, torch.zeros(sum(others) // 2)])  # captions extend along one axis
    angles = places[:, None, :, None] * speeds  # (K, 1, L, head width / 2)
    return MASKED * (places >= 0).float(), angles.cos(), angles.sin()


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text, with blocks that have no modulation."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.Parameter(torch.empty(spec.caption_channels))
        self.embed = nn.Linear(spec.caption_channels, spec.hidden)
        self.pad_token = nn.Parameter(torch.empty(1, spec.hidden))
        count = range(spec.blocks[0].count)
        self.attn, self.mlp = (
            nn.ModuleList(Branch(spec, branch) for _ in count) for branch in BRANCHES
        )

    def forward(self, captions: Tensor, bias: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, L, C) and bias (K, L) float32, caption_rows (B,) to text (B, L, D)."""
        count, tokens, width = captions.shape
        h = rms_norm(captions.to(self.norm.dtype), self.norm, EPSILON).reshape(-1, width)
        embedded = self.embed(h).reshape(count, tokens, -1)
        text = torch.where((bias > MASKED / 2)[..., None], embedded, self.pad_token)
        mask, cos, sin = padded_captions(self.spec, bias)
        turn = partial(turned, cos=cos, sin=sin)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            text = text + attn(text, None, attend, turn, mask[:, None, None])
            text = text + mlp(text, None)
        return text.index_select(0, caption_rows)


class ConditioningUnit(nn.Module):
    """Timesteps to the modulation table, the same for every caption.

    ``places`` are as in `joint_conditions.ConditioningUnit`, without those of the final layer.
    """

    def __init__(self, spec: ModelSpec, places: Sequence[int]) -> None:
        super().__init__()
        self.gates, self.places, self.hidden = len(spec.features), list(places), spec.hidden
        self.fc1, self.fc2 = nn.Linear(TIMESTEP_FREQUENCIES, INNER), nn.Linear(INNER, CONDITION)
        self.modulation = nn.Linear(CONDITION, (max(places) + 1) * spec.hidden)
        self.final = nn.Linear(CONDITION, spec.hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (S,), from 1000 for noise to 0, to the table (S, M, 1, D)."""
        features = timestep_features(TRAIN_STEPS - t).to(self.fc1.weight.dtype)
        condition = self.fc2(F.silu(self.fc1(features)))
        rows = self.modulation(condition).reshape(t.shape[0], -1, self.hidden)
        rows = rows.index_select(1, torch.tensor(self.places))
        scale = self.final(F.silu(condition)).unsqueeze(1)
        gates, scales = rows[:, : self.gates].tanh(), rows[:, self.gates :]
        return torch.cat([gates, torch.zeros_like(scale), scale, scales], dim=1).unsqueeze(2)


class FinalUnit(any_size.FinalUnit):
    """Tokens to the model output, whose sign is that of other flows: noise minus clean."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens (B, h, w, D) and modulation (B, D) to the output by patches, float32."""
        return -super().forward(x, shift, scale)


class ZImageFamily(JointFamily):
    """The family, which has modules of its own."""

    def modules(self, spec: ModelSpec, places: Sequence[int]) -> Mapping[str, MakeModule]:
        """See `JointFamily`."""
        return {
            "conditioning": partial(ConditioningUnit, spec, places),
            "captions": partial(CaptionsUnit, spec),
            "embed": partial(any_size.EmbedUnit, spec, channels_last=True),
            "final": partial(FinalUnit, spec),
        }


FAMILY = ZImageFamily(
    "Z-Image",
    _layers,
    _row,
    dict.fromkeys(BRANCHES, partial(NormedUnit, place=padded_captions)),
    block_names,
    final_rows=(),
    masked=("attn", "captions"),
    fp16=True,
    unread=lambda spec: {"x_pad_token": (1, spec.hidden)},
)
Z_IMAGE = Architecture(
    "z-image",
    frozenset({"cap_pad_token", "x_pad_token", f"all_x_embedder.{KEY}.weight"}),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("ZImagePipeline",), "ZImageTransformer2DModel", spec_from_config, even_sigmas=True
    ),
)
