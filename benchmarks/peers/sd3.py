"""A Stable Diffusion 3.5 with random weights, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import goc_deploy
from benchmarks.make_checkpoint import random_state
from benchmarks.peers.model import Arrays, PeerModel, parameters_of, table_of_captions, work_of
from benchmarks.work import Predict
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.exporters.architectures.reading import PIXELS_PER_LATENT
from goc_deploy.exporters.architectures.sd3_layout import TABLE
from goc_deploy.exporters.architectures.sd3_spec import HEAD, spec_of
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec

POSITION_TABLE = 96  # tokens per side


def random_sd3(
    folder: Path,
    images: int,
    steps: int,
    plans: Sequence[str],
    *,
    depth: int = 8,
    heads: int = 10,
    pixels: int = 256,
) -> PeerModel:
    """A model of which the first half of the blocks are dual, exported with plans to a folder."""
    spec = spec_of(
        depth,
        heads,
        HEAD * heads,
        dual=range(depth // 2),
        qk_norm=True,
        table=POSITION_TABLE,
        grid=pixels // PIXELS_PER_LATENT // 2,
    )
    state = random_state(spec, 0)
    file, engine = folder / "sd3.safetensors", folder / "engine"
    save_file(state, file)
    goc_deploy.export(
        file, engine, plans=plans, steps=steps, max_batch=images, size=(pixels, pixels)
    )
    weights = {name: tensor.float() for name, tensor in state.items()}
    weights[TABLE] = exact_positions(spec)
    arrays = random_captions(spec, images)

    def transformer() -> nn.Module:
        with torch.device("meta"):
            model = SD3Transformer2DModel(**_config(spec))
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    return PeerModel(
        f"SD3.5 with {depth} blocks of width {spec.hidden}, {parameters_of(weights.values())}, "
        f"random weights, {pixels} x {pixels} pixels",
        spec,
        engine,
        transformer,
        lambda model: predict_with(model, arrays),
        work_of(engine, plans[0], tuple(range(images)), images),
        prompt_embeds_from_arrays(arrays, spec, "captions"),
    )


def exact_positions(spec: ModelSpec) -> Tensor:
    """The position table before it was rounded to bfloat16, which the exporter makes anew."""
    table = size_tensors(spec.at((POSITION_TABLE, POSITION_TABLE)))["positions"]
    return torch.from_numpy(table).reshape(1, POSITION_TABLE**2, spec.hidden)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """The arguments of ``SD3Transformer2DModel``."""
    return {
        "sample_size": spec.latents[-1],
        "num_layers": spec.depth,
        "attention_head_dim": HEAD,
        "num_attention_heads": spec.heads,
        "joint_attention_dim": spec.caption_channels,
        "caption_projection_dim": spec.hidden,
        "pooled_projection_dim": spec.pooled_channels,
        "pos_embed_max_size": POSITION_TABLE,
        "dual_attention_layers": tuple(range(spec.depth // 2)),
        "qk_norm": "rms_norm",
    }


def random_captions(spec: ModelSpec, images: int) -> Arrays:
    """A caption for each image and a negative one, under the names that diffusers has."""
    draw, arrays = np.random.default_rng(1).standard_normal, {}
    for sign, rows in (("", images), ("negative_", 1)):
        shape = (rows, spec.caption_tokens, spec.caption_channels)
        arrays[f"{sign}prompt_embeds"] = draw(shape).astype(np.float32)
        pooled = draw((rows, spec.pooled_channels)).astype(np.float32)
        arrays[f"{sign}pooled_prompt_embeds"] = pooled
    return arrays


def predict_with(transformer: nn.Module, arrays: Arrays) -> Predict:
    captions, pooled = (
        torch.from_numpy(table_of_captions(arrays, name))
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    return lambda x, t, rows, _: transformer(x, captions[rows], pooled[rows], t).sample
