"""Refusals by name of what is no LoRA of linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from goc_deploy.errors import ModelError
from tests.exporters.lora.files import loras_of, random_lora, saved

LAYER = "transformer.proj_out_1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{LAYER}.lora_magnitude_vector", "is DoRA"),
        ("lora_unet_proj_out_1.dora_scale", "is DoRA"),
        ("lora_unet_proj_out_1.hada_w1_a", "is LoHa"),
        ("lora_unet_proj_out_1.lokr_w1", "is LoKr"),
        ("lora_unet_proj_out_1.lora_mid.weight", "is a LoRA of convolutions"),
        (f"{LAYER}.lora_embedding_A", "is a LoRA of an embedding"),
        (f"{LAYER}.lora_B.bias", "is a LoRA with biases"),
        ("blocks.0.attn1.processor.to_q_lora.down.weight", "in attention processors"),
        ("text_encoder.layer.lora_A.weight", "changes a text encoder .* as `text_encoder`"),
        ("lora_te1_layer.lora_down.weight", "changes a text encoder"),
        ("blocks.0.attn.qkv.weight", "no tensor of a LoRA; known are the layouts of diffusers"),
    ],
)
def test_other_adapters_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    file = saved(random_lora()[0] | {name: torch.ones(4, 48)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=message):
        loras_of(file)


def test_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    down, up = torch.ones(4, 4, 2, 2), torch.ones(48, 4, 1, 1)
    names = ("pos_embed.proj.lora_A.weight", "pos_embed.proj.lora_B.weight")
    file = saved(dict(zip(names, (down, up), strict=True)), tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=r"a LoRA of convolutions \(pos_embed\.proj has matrices"):
        loras_of(file)


def test_matrices_of_different_ranks_are_refused(tmp_path: Path) -> None:
    tensors = random_lora()[0] | {f"{LAYER}.lora_A.weight": torch.ones(5, 48)}
    with pytest.raises(ModelError, match=r"matrices of proj_out_1 do not fit .* \(5, 48\)"):
        loras_of(saved(tensors, tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_matrix_alone_is_refused(part: str, tmp_path: Path) -> None:
    tensors = random_lora()[0]
    del tensors[f"{LAYER}.lora_{part}.weight"]
    with pytest.raises(ModelError, match="proj_out_1 has only some of the matrices"):
        loras_of(saved(tensors, tmp_path / "lora.safetensors"))


def test_a_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    twice = random_lora("peft")[0] | random_lora("plain")[0]
    with pytest.raises(ModelError, match="twice"):
        loras_of(saved(twice, tmp_path / "lora.safetensors"))
