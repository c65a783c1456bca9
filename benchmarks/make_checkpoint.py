"""Write a DiT or PixArt checkpoint of a public size with random weights, in the public layout.

    python benchmarks/make_checkpoint.py XL/2 dit-xl-2.pt
    python benchmarks/make_checkpoint.py PixArt-XL/2 pixart-xl-2.pth
    python benchmarks/make_checkpoint.py PixArt-Sigma-XL/2 sigma.pth --image-size 1024

Random weights cost what trained ones cost. adaLN layers are not zero, so every unit has an effect.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.exporters.architectures.pixart import NULL_CAPTION, PublicLayout
from goc_deploy.exporters.tracing import shapes_of
from goc_deploy.spec import ModelSpec

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MODULATION_SCALE = 0.3
PIXART, SIGMA = "PixArt-", "PixArt-Sigma-"
PIXART_SPEC = {
    "choices": 0,
    "architecture": "pixart",
    "branches": ("attn", "cross", "mlp"),
    "guided_channels": 4,
    "caption_channels": 4096,
    "caption_tokens": 120,
}
SIGMA_SPEC = {**PIXART_SPEC, "architecture": "pixart-sigma", "caption_tokens": 300}


def spec_of(name: str, image_size: int) -> ModelSpec:
    """The sizes of ``XL/2``, ``PixArt-XL/2`` and so on for images of ``image_size`` pixels.

    The latents are those of a VAE that reduces height and width by 8.
    """
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
    shapes = shapes_of(lambda: PublicLayout(spec) if spec.text_conditional else DiT(spec))
    if spec.text_conditional:
        shapes[NULL_CAPTION] = (spec.caption_tokens, spec.caption_channels)
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 2500
        scale = MODULATION_SCALE if "adaLN" in name or "t_block" in name else 1.0
        state[name] = torch.randn(shape, generator=generator).mul_(scale * fan_in**-0.5)
    return state


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="S/2, B/2, L/2, XL/2, or another patch size; PixArt-XL/2, PixArt-Sigma-XL/2"
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    state = random_state(spec_of(args.model, args.image_size), args.seed)
    temporary = args.output.with_name(f".{args.output.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: {sum(t.numel() for t in state.values()) / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
