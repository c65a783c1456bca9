"""The PixArt of the digits, with its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from tokenizers import Tokenizer
from torch import Tensor, nn

import goc_deploy
from benchmarks.diffusers_state import pixart_state
from benchmarks.peers.model import Arrays, PeerModel, parameters_of, table_of_captions, work_of
from benchmarks.work import Predict
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.exporters.checkpoint import load_checkpoint
from goc_deploy.exporters.companions.t5 import T5Encoder, read_text_encoder
from goc_deploy.spec import ModelSpec

DIGITS = Path(__file__).resolve().parents[2] / "examples/mnist"
CHECKPOINT, HEADS = DIGITS / "pixart_mnist.pt", 4
PROMPTS = (DIGITS / "prompts.txt").read_text(encoding="utf-8").splitlines()


def digits_pixart(folder: Path, images: int, steps: int, plans: Sequence[str]) -> PeerModel:
    """The trained model, exported with plans to a folder."""
    engine = folder / "engine"
    goc_deploy.export(
        CHECKPOINT, engine, num_heads=HEADS, plans=plans, steps=steps, max_batch=images
    )
    spec = EngineDir.open(engine).manifest.model
    stored = load_checkpoint(CHECKPOINT, "auto").tensors
    public = {name: tensor.float() for name, tensor in stored.items()}
    weights, positions = pixart_state(public, spec), public["pos_embed"]
    arrays = encoded([PROMPTS[i % len(PROMPTS)] for i in range(images)], spec)

    def transformer() -> nn.Module:
        with torch.device("meta"):
            model = PixArtTransformer2DModel(**_config(spec))
        model.load_state_dict(weights, assign=True)
        model.pos_embed.pos_embed = positions
        return model.eval().requires_grad_(False)

    return PeerModel(
        f"PixArt of the digits, {parameters_of(weights.values())}, trained",
        spec,
        engine,
        transformer,
        lambda model: predict_with(model, arrays),
        work_of(engine, plans[0], tuple(range(images)), images),
        prompt_embeds_from_arrays(arrays, spec, "captions"),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    """The arguments of ``PixArtTransformer2DModel``."""
    return {
        "sample_size": spec.latents[-1],
        "patch_size": spec.patch,
        "num_layers": spec.depth,
        "attention_head_dim": spec.hidden // spec.heads,
        "num_attention_heads": spec.heads,
        "cross_attention_dim": spec.hidden,
        "in_channels": spec.channels,
        "out_channels": spec.output_channels,
        "caption_channels": spec.caption_channels,
        "use_additional_conditions": False,
    }


@torch.inference_mode()
def encoded(prompts: Sequence[str], spec: ModelSpec) -> Arrays:
    """Prompts and an empty negative one, under the names that diffusers has."""
    files = read_text_encoder(DIGITS / "text_encoder", spec)
    encoder = T5Encoder(files.config, spec.caption_tokens)
    encoder.load_state_dict(dict(files.checkpoint.tensors))
    tokenizer = Tokenizer.from_str(files.tokenizer.decode())
    tokenizer.enable_padding(pad_id=files.config.pad, length=spec.caption_tokens)
    arrays = {}
    for sign, texts in (("", prompts), ("negative_", [""])):
        read = tokenizer.encode_batch(list(texts))
        mask = torch.tensor([row.attention_mask for row in read], dtype=torch.float32)
        embeds = encoder.eval()(torch.tensor([row.ids for row in read]), mask)
        arrays[f"{sign}prompt_embeds"] = embeds.numpy()
        arrays[f"{sign}prompt_attention_mask"] = mask.numpy()
    return arrays


def predict_with(transformer: nn.Module, arrays: Arrays) -> Predict:
    captions, mask = (
        torch.from_numpy(np.ascontiguousarray(table_of_captions(arrays, name)))
        for name in ("prompt_embeds", "prompt_attention_mask")
    )
    told = {"resolution": None, "aspect_ratio": None}

    def predict(x: Tensor, t: Tensor, rows: Tensor, _: int) -> Tensor:
        return transformer(
            x,
            encoder_hidden_states=captions[rows],
            encoder_attention_mask=mask[rows],
            timestep=t,
            added_cond_kwargs=told,
        ).sample

    return predict
