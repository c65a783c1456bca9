"""Write a checkpoint of a public size with random weights, in its layout.

    python benchmarks/make_checkpoint.py XL/2 dit-xl-2.pt
    python benchmarks/make_checkpoint.py PixArt-XL/2 pixart-xl-2.pth
    python benchmarks/make_checkpoint.py Wan-1.3B wan-1.3b.safetensors
    python benchmarks/make_checkpoint.py SD3.5-Medium sd3.5-medium.safetensors
    python benchmarks/make_checkpoint.py PixArt-Sigma-XL/2 sigma.pth --image-size 1024
    python benchmarks/make_checkpoint.py Qwen-Image qwen.safetensors --depth 4
    python benchmarks/make_checkpoint.py FLUX.1-dev flux.safetensors --depth 6

A third of the blocks of a FLUX.1 are double blocks. Weights of Wan, Stable Diffusion 3, FLUX.1 and
Qwen-Image are bfloat16, as the public ones. Random weights cost what trained ones cost. adaLN
layers are not zero, so every unit has an effect.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.exporters.architectures.flux import FAMILY as FLUX_FAMILY
from goc_deploy.exporters.architectures.flux import FluxConfig
from goc_deploy.exporters.architectures.flux import spec_of as flux_spec
from goc_deploy.exporters.architectures.flux2 import FAMILY as FLUX2_FAMILY
from goc_deploy.exporters.architectures.pixart import NULL_CAPTION, PublicLayout
from goc_deploy.exporters.architectures.pixart_diffusers import ROWS_OF_BRANCHES
from goc_deploy.exporters.architectures.qwen import FAMILY as QWEN_FAMILY
from goc_deploy.exporters.architectures.qwen import spec_of as qwen_spec
from goc_deploy.exporters.architectures.sd3 import FAMILY as SD3_FAMILY
from goc_deploy.exporters.architectures.sd3_layout import TABLE
from goc_deploy.exporters.architectures.sd3_spec import spec_of as sd3_spec
from goc_deploy.exporters.architectures.wan_diffusers import shapes_from_spec as wan_shapes
from goc_deploy.exporters.architectures.wan_diffusers import spec_of as wan_spec
from goc_deploy.exporters.architectures.z_image import FAMILY as Z_FAMILY
from goc_deploy.exporters.tracing import shapes_of
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MODULATION_SCALE = 0.3
MODULATING = ("adaLN", "t_block", "time_proj", "norm1", "norm.linear", "norm_out.", "_mod.")
PIXART, SIGMA = "PixArt-", "PixArt-Sigma-"
WAN_SIZES = {  # blocks, heads of 128, width of the MLP, channels of the latents
    "Wan-1.3B": (30, 12, 8960, 16),
    "Wan-5B": (30, 24, 14336, 48),
    "Wan-14B": (40, 40, 13824, 16),
}
SD3_SIZES: dict[str, dict[str, Any]] = {  # blocks, heads of 64, blocks with a second attention
    "SD3-Medium": {"depth": 24, "heads": 24, "dual": (), "qk_norm": False, "table": 192},
    "SD3.5-Medium": {"depth": 24, "heads": 24, "dual": range(13), "qk_norm": True, "table": 384},
    "SD3.5-Large": {"depth": 38, "heads": 38, "dual": (), "qk_norm": True, "table": 192},
}
QWEN = "Qwen-Image"
FLUX = ("FLUX.1-dev", "FLUX.1-schnell")
# Families with the layout of diffusers, whose public weights are bfloat16.
SHAPES = {
    "wan": wan_shapes,
    "sd3": SD3_FAMILY.shapes,
    "qwen-image": QWEN_FAMILY.shapes,
    "flux": FLUX_FAMILY.shapes,
    "flux2": FLUX2_FAMILY.shapes,
    "z-image": Z_FAMILY.shapes,
}
PIXART_SPEC = {
    "choices": 0,
    "architecture": "pixart",
    "branches": ("attn", "cross", "mlp"),
    "guided_channels": 4,
    "caption_channels": 4096,
    "caption_tokens": 120,
    "rows": ROWS_OF_BRANCHES,
}
SIGMA_SPEC = {**PIXART_SPEC, "architecture": "pixart-sigma", "caption_tokens": 300}


def spec_of(name: str, image_size: int, depth: int | None = None) -> ModelSpec:
    """The sizes of ``XL/2``, ``PixArt-XL/2`` and so on for images of ``image_size`` pixels.

    The latents are those of a VAE that reduces height and width by 8. A depth other than that of
    the public model is for Qwen-Image, FLUX.1 and Stable Diffusion 3 alone.
    """
    if name == QWEN:
        return qwen_spec(depth or 60, 24, (16, 56, 56), channels=16, text=3584)
    if name in FLUX:
        doubles = (depth or 57) // 3
        singles = (depth or 57) - doubles
        return flux_spec(
            FluxConfig(
                num_layers=doubles, num_single_layers=singles, guidance_embeds=name == FLUX[0]
            )
        )
    if name in WAN_SIZES:
        depth, heads, ffn, channels = WAN_SIZES[name]
        return wan_spec(depth, heads, 128, ffn=ffn, channels=channels, text=4096)
    if name in SD3_SIZES:
        sizes = SD3_SIZES[name]
        blocks = depth or sizes["depth"]
        dual = [number for number in sizes["dual"] if number < blocks]
        return sd3_spec(hidden=64 * sizes["heads"], **{**sizes, "depth": blocks, "dual": dual})
    size, patch = name.removeprefix(SIGMA).removeprefix(PIXART).split("/")
    depth, hidden, heads = SIZES[size]
    spec = ModelSpec(
        depth, hidden, heads, 4 * hidden, int(patch), image_size // 8 // int(patch), 4, 1000, True
    )
    if not name.startswith(PIXART):
        return spec
    return replace(spec, **(SIGMA_SPEC if name.startswith(SIGMA) else PIXART_SPEC))


def random_state(spec: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations of order one through the depth."""
    generator = torch.Generator().manual_seed(seed)
    if spec.architecture in SHAPES:
        shapes = dict(SHAPES[spec.architecture](spec))
        shapes.pop(TABLE, None)  # it is not random
    else:
        shapes = shapes_of(lambda: PublicLayout(spec) if spec.text_conditional else DiT(spec))
    if spec.architecture in ("pixart", SIGMA_SPEC["architecture"]):
        shapes[NULL_CAPTION] = (spec.caption_tokens, spec.caption_channels)
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 2500
        modulates = any(part in name for part in MODULATING)
        scale = MODULATION_SCALE if modulates else 1.0
        state[name] = torch.randn(shape, generator=generator).mul_(scale * fan_in**-0.5)
        if spec.architecture in SHAPES:
            norm = "norm" in name and name.endswith("weight") and len(shape) == 1
            state[name] = (state[name] + (1.0 if norm else 0.0)).bfloat16()
    if spec.architecture == "sd3":
        state[TABLE] = _whole_table(spec)
    return state


def _whole_table(spec: ModelSpec) -> torch.Tensor:
    """The position table of a Stable Diffusion 3, of which samples show the middle."""
    assert spec.positions is not None
    side = spec.positions.table
    table = size_tensors(spec.at((side, side)))["positions"]
    return torch.from_numpy(table).reshape(1, side**2, spec.hidden).bfloat16()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model",
        help="S/2, B/2, L/2, XL/2, or another patch size; PixArt-XL/2, PixArt-Sigma-XL/2; "
        f"{', '.join((*WAN_SIZES, *SD3_SIZES, QWEN, *FLUX))}",
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument(
        "--depth",
        type=int,
        help="number of blocks of a Qwen-Image, a FLUX.1 or a Stable Diffusion 3; default: that of "
        "the public model",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    state = random_state(spec_of(args.model, args.image_size, args.depth), args.seed)
    temporary = args.output.with_name(f".{args.output.name}.tmp")
    if args.output.suffix == ".safetensors":
        save_file(state, temporary)
    else:
        torch.save(state, temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: {sum(t.numel() for t in state.values()) / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
