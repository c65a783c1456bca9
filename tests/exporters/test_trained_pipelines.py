"""The shipped models of VAE latents draw what whole pipelines of diffusers draw.

The pipelines have the same tensors, and the pictures agree to the pixel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.exporters.architectures.pixart_diffusers import layer_names
from goc_deploy.spec import ModelSpec
from tests.conftest import MNIST
from tests.exporters.architectures.test_pixart import CONFIG
from tests.reference import relative_l2

STEPS = 8
NULL_OF_THE_PIPELINE = 1000
PROMPTS = ["a three", "Draw the number seven ", "zero"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves


def noise(images: int) -> np.ndarray:
    return np.random.default_rng(8).standard_normal((images, 4, 7, 7)).astype(np.float32)


def assert_same_pictures(found: Any, latents: np.ndarray, images: np.ndarray) -> None:
    """``latents`` (N, C, H, W) and ``images`` (N, H, W, channels), 0..1, are the judge's."""
    assert relative_l2(found.latents, latents) < 1e-3
    assert np.abs(found.images - 255 * images).max() < 1


@pytest.fixture
def vae() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    return diffusers.AutoencoderKL.from_pretrained(MNIST / "vae").eval()


def test_classes_are_drawn_as_by_the_dit_pipeline(vae: Any, tmp_path: Path) -> None:
    import diffusers

    from benchmarks.diffusers_state import diffusers_state

    shipped = MNIST / "latent_dit_mnist.pt"
    more = {
        "vae": MNIST / "vae",
        "num_heads": 4,
        "sampler": "ddim@leading",
        "steps": STEPS,
        "max_batch": 4,
    }
    spec = goc_deploy.export(shipped, tmp_path / "engine", plans=["none"], **more).model
    state = torch.load(shipped, weights_only=True)
    table = state["y_embedder.embedding_table.weight"]
    padded = torch.cat(
        [table[:-1], torch.zeros(NULL_OF_THE_PIPELINE - spec.choices, spec.hidden), table[-1:]]
    )
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=spec.heads,
        attention_head_dim=spec.hidden // spec.heads,
        in_channels=4,
        out_channels=4,
        num_layers=spec.depth,
        sample_size=spec.side,
        patch_size=spec.patch,
        norm_eps=1e-6,
    )
    renamed = diffusers_state({**state, "y_embedder.embedding_table.weight": padded}, spec)
    transformer.load_state_dict(renamed, strict=False)  # the position table is computed
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = (
            0  # the checkpoint's convention; diffusers' default is 1
        )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02)
    judge = diffusers.DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=scheduler)
    judge.set_progress_bar_config(disable=True)
    given, labels, decoded = (
        torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(4)),
        [3, 0, 8],
        [],
    )
    vae.decode = lambda latents, _own=vae.decode, **more: (
        decoded.append(latents) or _own(latents, **more)
    )
    call = {
        "guidance_scale": 4.0,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(4),
    }
    images = judge(labels, **call, output_type="np").images
    with goc_deploy.load(tmp_path / "engine") as pipe:
        found = pipe.generate(labels, cfg_scale=4.0, cfg_channels=4, latents=given.numpy())
    assert_same_pictures(found, decoded[0].numpy() * vae.config.scaling_factor, images)


def test_prompts_are_drawn_as_by_the_pixart_pipeline(vae: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers comes with the judges extra"
    )
    import diffusers

    shipped, texts = MNIST / "pixart_mnist.pt", MNIST / "text_encoder"
    more = {
        "text_encoder": texts,
        "num_heads": 4,
        "sampler": "dpm++",
        "steps": STEPS,
        "max_batch": 4,
    }
    spec = goc_deploy.export(
        shipped, tmp_path / "engine", plans=["none"], vae=MNIST / "vae", **more
    ).model
    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")} | {
        "attention_head_dim": spec.hidden // spec.heads,
        "caption_channels": spec.caption_channels,
        "cross_attention_dim": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_layers": spec.depth,
        "out_channels": 4,
        "patch_size": spec.patch,
        "sample_size": spec.side,
        "use_additional_conditions": False,
    }
    transformer = diffusers.PixArtTransformer2DModel(**config).eval()
    transformer.load_state_dict(
        pixart_state(torch.load(shipped, weights_only=True), spec), strict=False
    )
    special = json.loads((texts / "config.json").read_text())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(texts / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        special["pad_token_id"],
        special["eos_token_id"],
    )
    judge = diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel.from_pretrained(texts).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
        ),
    )
    judge.set_progress_bar_config(disable=True)
    judge.check_inputs = lambda *_, **__: None  # it refuses sides that 8 does not divide
    call = {
        "prompt": PROMPTS,
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "guidance_scale": 4.5,
        "height": 28,
        "width": 28,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": spec.caption_tokens,
        "latents": torch.from_numpy(noise(len(PROMPTS))),
    }
    latents = judge(**call, output_type="latent").images.numpy()
    images = judge(**call, output_type="np").images
    with goc_deploy.load(tmp_path / "engine") as pipe:
        captions = pipe.encode(PROMPTS, ("",))
        found = pipe.generate(prompt_embeds=captions, latents=noise(len(PROMPTS)), cfg_scale=4.5)
    assert_same_pictures(found, latents, images)


def pixart_state(state: Mapping[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Tensors of the public layout under diffusers' names.

    This is the exporter's mapping in the other direction.
    """
    found = {"scale_shift_table": state["final_layer.scale_shift_table"]}
    for kind in ("weight", "bias"):
        found |= {
            f"{theirs}.{kind}": state[f"{ours}.{kind}"]
            for ours, theirs in layer_names(spec).items()
        }
        for i in range(spec.depth):
            for ours, attention, parts in (
                ("attn.qkv", "attn1", "qkv"),
                ("cross_attn.kv_linear", "attn2", "kv"),
            ):
                split = state[f"blocks.{i}.{ours}.{kind}"].chunk(len(parts))
                there = f"transformer_blocks.{i}.{attention}"
                found |= {
                    f"{there}.to_{part}.{kind}": tensor
                    for part, tensor in zip(parts, split, strict=True)
                }
    for i in range(spec.depth):
        found[f"transformer_blocks.{i}.scale_shift_table"] = state[f"blocks.{i}.scale_shift_table"]
    return found
