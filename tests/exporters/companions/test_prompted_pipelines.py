"""From prompts to latents: exported pipelines with CLIP and T5 against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.runtime.pipeline import Pipeline
from tests.exporters.companions.test_text_encoders import (
    WIDTH,
    as_on_the_hub,
    diffusers,
    flux_pipeline,
    random_weights,
    sd3_pipeline,
)
from tests.reference import relative_l2

PROMPTS = ["the red cat! a seven"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def exported(judge: Any, transformer: Any, folder: Path, **more: Any) -> Pipeline:
    """The pipeline of diffusers with a random transformer, exported and loaded."""
    judge.register_modules(transformer=random_weights(transformer, 5).eval())
    judge.save_pretrained(folder / "model")
    as_on_the_hub(folder / "model", folder)
    goc_deploy.export(
        folder / "model",
        folder / "engine",
        steps=4,
        plans=["none"],
        text_encoder=folder / "model",
        max_batch=1,
        **more,
    )
    return goc_deploy.load(folder / "engine")


def noise_of(pipe: Pipeline) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, *pipe.spec.latents), np.float32)


def test_prompts_of_stable_diffusion_3_are_drawn_as_by_diffusers(tmp_path: Path) -> None:
    judge = sd3_pipeline(tmp_path)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=22,
    )  # fmt: skip
    with exported(judge, transformer, tmp_path) as pipe:
        noise = noise_of(pipe)
        found = pipe.generate(
            prompts=PROMPTS, negative_prompts=["a blue"], latents=noise, cfg_scale=4.0
        )
    _, height, width = (judge.vae_scale_factor * side for side in noise.shape[1:])
    with torch.inference_mode():
        expected = judge(
            prompt=PROMPTS, negative_prompt=["a blue"], guidance_scale=4.0, num_inference_steps=4,
            latents=torch.from_numpy(noise), output_type="latent", height=height, width=width,
        ).images  # fmt: skip
    assert relative_l2(found.latents, expected.numpy()) < 1e-4


def test_prompts_of_flux_are_drawn_as_by_diffusers(tmp_path: Path) -> None:
    judge = flux_pipeline(tmp_path)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=24,
        axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    size = {"size": (96, 64), "max_size": (128, 128)}
    with exported(judge, transformer, tmp_path, **size) as pipe:
        noise = noise_of(pipe)
        found = pipe.generate(prompts=PROMPTS, latents=noise, guidance=2.0)
    assert (found.report["guidance"], found.report["cfg_scale"]) == (2.0, 1.0)
    images, channels, rows, columns = noise.shape
    packed = judge._pack_latents(torch.from_numpy(noise), images, channels, rows, columns)
    height, width = judge.vae_scale_factor * rows, judge.vae_scale_factor * columns
    with torch.inference_mode():
        tokens = judge(
            prompt=PROMPTS, guidance_scale=2.0, num_inference_steps=4, latents=packed,
            output_type="latent", height=height, width=width,
        ).images  # fmt: skip
        expected = judge._unpack_latents(tokens, height, width, judge.vae_scale_factor)
    assert relative_l2(found.latents, expected.numpy()) < 1e-4
