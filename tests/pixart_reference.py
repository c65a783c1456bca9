"""PixArt in plain PyTorch on tensors of the public layout.

It runs a feature at a time, so that a test can cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from goc_deploy.exporters.architectures.dit_diffusers import position_table
from goc_deploy.exporters.architectures.dit_model import timestep_features, unpatchify
from goc_deploy.exporters.architectures.pixart import PublicLayout
from goc_deploy.exporters.architectures.pixart_diffusers import ROWS_OF_BRANCHES
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.reference import table_step

SPEC = ModelSpec(
    2, 48, 3, 192, 2, 4, 4, 0, True, "pixart", ("attn", "cross", "mlp"), guided_channels=4,
    caption_channels=20, caption_tokens=11, told_size=64, rows=ROWS_OF_BRANCHES,
)  # fmt: skip
Feature = Callable[
    [int, Callable[[], Tensor]], Tensor
]  # (unit, what computes it) -> the feature to use


def random_state(spec: ModelSpec = SPEC, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint in the public layout, with the null caption that its reference keeps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in PublicLayout(spec).state_dict().items()}
    state = {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["pos_embed"] = position_table(spec)
    state["y_embedder.y_embedding"] = torch.randn(
        spec.caption_tokens, spec.caption_channels, generator=generator
    )
    return state


def forward(
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    x: Tensor,
    t: Tensor,
    captions: Tensor,
    mask: Tensor,
    feature: Feature,
) -> Tensor:
    """From (B, C, H, W) latents, (B,) timesteps, (B, L, C) captions and (B, L) masks.

    The result is the model output.
    """

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def mlp(name: str, value: Tensor) -> Tensor:
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", value)))

    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (spec.heads, -1)).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=keep)
        return mixed.transpose(1, 2).flatten(2)

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale) + shift

    condition = mlp("t_embedder", timestep_features(t))
    if spec.told_size:
        size = mlp(
            "csize_embedder", timestep_features(torch.full((2,), float(spec.told_size)))
        ).reshape(1, -1)
        condition = condition + torch.cat(
            [size, mlp("ar_embedder", timestep_features(torch.ones(1)))], dim=1
        )
    shared = linear("t_block.1", F.silu(condition)).unflatten(-1, (6, -1))
    y = linear("y_embedder.y_proj.fc1", captions)
    y = linear("y_embedder.y_proj.fc2", F.gelu(y, approximate="tanh"))
    h = F.conv2d(
        x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=spec.patch
    )
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    for i in range(spec.depth):
        block = f"blocks.{i}"
        own = (shared + state[f"{block}.scale_shift_table"]).unsqueeze(2)  # (B, 6, 1, D)
        qkv = f"{block}.attn.qkv"
        h = h + own[:, 2] * feature(
            3 * i,
            lambda b=block, q=qkv, h=h, own=own: linear(
                f"{b}.attn.proj",
                attention(*linear(q, modulated(h, own[:, 0], own[:, 1])).chunk(3, dim=-1)),
            ),
        )
        h = h + feature(
            3 * i + 1,
            lambda b=block, h=h: linear(
                f"{b}.cross_attn.proj",
                attention(
                    linear(f"{b}.cross_attn.q_linear", h),
                    *linear(f"{b}.cross_attn.kv_linear", y).chunk(2, dim=-1),
                    keep=mask.bool()[:, None, None],
                ),
            ),
        )
        h = h + own[:, 5] * feature(
            3 * i + 2,
            lambda b=block, h=h, own=own: linear(
                f"{b}.mlp.fc2",
                F.gelu(
                    linear(f"{b}.mlp.fc1", modulated(h, own[:, 3], own[:, 4])), approximate="tanh"
                ),
            ),
        )
    last = (condition.unsqueeze(1) + state["final_layer.scale_shift_table"]).unsqueeze(2)
    return unpatchify(linear("final_layer.linear", modulated(h, last[:, 0], last[:, 1])), spec)


def hook_units(judge: Any) -> dict[str, Feature]:
    """Let every branch of a PixArtTransformer2DModel take its result from a `Feature`.

    Returns:
        The dictionary whose entry ``feature`` is called; the caller sets it.
    """
    hooked: dict[str, Feature] = {}
    for i, block in enumerate(judge.transformer_blocks):
        for branch, layer in enumerate((block.attn1, block.attn2, block.ff)):

            def cached(
                *args: Any, _unit: int = 3 * i + branch, _own: Any = layer.forward, **more: Any
            ) -> Tensor:
                return hooked["feature"](_unit, lambda: _own(*args, **more))

            layer.forward = cached
    return hooked


class Cache:
    """Features of every unit as a schedule wants them: histories as lists."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self.step = schedule, 0
        self._histories: list[list[Tensor]] = [[] for _ in range(schedule.units)]

    def __call__(self, unit: int, compute: Callable[[], Tensor]) -> Tensor:
        row, history = self._schedule.coefficients[self.step][unit], self._histories[unit]
        g = sum(c * old for c, old in zip(row, history, strict=False)) if row else compute()
        if not row or self._schedule.history == "used":
            history.insert(0, g)
        return g  # type: ignore[return-value]


@torch.inference_mode()
def eager_latents(
    model: Callable[[Tensor, Tensor, Feature], Tensor],
    schedule: Schedule,
    table: SamplerTable,
    noise: np.ndarray,
    cfg_scale: float,
    channels: int = 4,
) -> np.ndarray:
    """Final latents of a guided run.

    ``model`` takes (2N latents, 2N timesteps, feature), conditional rows first.
    """
    x, step_of, cache = torch.from_numpy(noise), table_step(table), Cache(schedule)
    for step, t in enumerate(table.timesteps):
        cache.step = step
        output = model(torch.cat([x, x]), torch.full((2 * len(x),), float(t)), cache)
        cond, uncond = output[:, :channels].chunk(2)
        x = step_of(step, x, uncond + cfg_scale * (cond - uncond), output, torch.zeros_like(x))
    return x.numpy()
