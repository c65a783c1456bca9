"""From prompts to latents: exported pipelines with CLIP, T5 and UMT5 against diffusers."""

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
    transformers,
)
from tests.exporters.companions.test_wan_vae import CONFIG as WAN_VAE
from tests.exporters.companions.test_wan_vae import OF_5B, judge_of
from tests.reference import relative_l2
from tests.t5_folder import CONFIG as T5
from tests.t5_folder import save_encoder

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


VAES: dict[str, dict[str, Any]] = {
    "2.1": WAN_VAE,
    "2.2-5B": {**OF_5B, "z_dim": 48, "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48},
}


@pytest.mark.parametrize("model", VAES)
def test_prompts_of_wan_are_drawn_as_by_diffusers(model: str, tmp_path: Path) -> None:
    """UMT5, UniPC and the decoder; a Wan 2.2 TI2V tells every token its time."""
    vae, newer = judge_of(VAES[model], tmp_path / "vae"), model == "2.2-5B"
    umt5 = transformers.UMT5EncoderModel(
        transformers.UMT5Config(**{**T5, "vocab_size": 160, "model_type": "umt5"})
    )
    tokens = transformers.T5Tokenizer.from_pretrained(save_encoder(tmp_path / "t5", vocab_size=160))
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=24, text_dim=20, ffn_dim=100, num_layers=3,
        in_channels=vae.config.z_dim, out_channels=vae.config.z_dim,
    )  # fmt: skip
    judge = diffusers.WanPipeline(
        tokens, random_weights(umt5, 4).eval(), vae, expand_timesteps=newer,
        transformer=random_weights(transformer, 5).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip
    judge.set_progress_bar_config(disable=True)
    judge.save_pretrained(tmp_path / "model")
    width, height, frames = (96, 64, 9) if newer else (48, 32, 9)
    goc_deploy.export(
        tmp_path / "model", tmp_path / "engine", steps=4, plans=["none"], max_batch=1,
        text_encoder=tmp_path / "model", vae=tmp_path / "model", size=(width, height),
        frames=frames,
    )  # fmt: skip
    prompt, negative = "a red  seven &amp; The three", "blue"
    with goc_deploy.load(tmp_path / "engine") as pipe:
        noise = noise_of(pipe)
        found = pipe.generate(prompts=[prompt], negative_prompts=[negative], latents=noise)
    expected = {
        kind: judge(
            prompt, negative, height=height, width=width, num_frames=frames, output_type=kind,
            num_inference_steps=4, guidance_scale=4.0, latents=torch.from_numpy(noise),
        ).frames
        for kind in ("latent", "np")
    }  # fmt: skip
    assert relative_l2(found.latents, expected["latent"].numpy()) < 1e-4
    assert found.images is not None
    assert found.images.shape == (1, frames, height, width, 3)
    for frame, theirs in zip(found.images[0], expected["np"][0], strict=True):
        assert np.abs(frame - 255 * theirs).max() < 1
