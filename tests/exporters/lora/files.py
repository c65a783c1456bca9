"""A small DiT, and LoRA files for it in every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.make_checkpoint import random_state
from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import Lora, read_loras
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, True)
STATE = random_state(SPEC, 0)
# Layer in diffusers -> tensor and first row in the public layout, outputs, inputs.
LAYERS = {
    "transformer_blocks.0.attn1.to_q": ("blocks.0.attn.qkv.weight", 0, 48, 48),
    "transformer_blocks.0.attn1.to_k": ("blocks.0.attn.qkv.weight", 48, 48, 48),
    "transformer_blocks.1.attn1.to_v": ("blocks.1.attn.qkv.weight", 96, 48, 48),
    "transformer_blocks.1.attn1.to_out.0": ("blocks.1.attn.proj.weight", 0, 48, 48),
    "transformer_blocks.0.ff.net.0.proj": ("blocks.0.mlp.fc1.weight", 0, 192, 48),
    "transformer_blocks.1.ff.net.2": ("blocks.1.mlp.fc2.weight", 0, 48, 192),
    "transformer_blocks.1.norm1.linear": ("blocks.1.adaLN_modulation.1.weight", 0, 288, 48),
    "proj_out_1": ("final_layer.adaLN_modulation.1.weight", 0, 96, 48),
}
Name = Callable[[str, str], str]  # (layer, down or up) -> tensor name
LAYOUTS: dict[str, Name] = {
    "diffusers": lambda layer, part: f"transformer.{layer}.lora_{_letter(part)}.weight",
    "diffusers-old": lambda layer, part: f"transformer.{layer}.lora.{part}.weight",
    "peft": lambda layer, part: f"base_model.model.{layer}.lora_{_letter(part)}.weight",
    "plain": lambda layer, part: f"{layer}.lora_{_letter(part)}.default.weight",
    "kohya": lambda layer, part: f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight",
}


def _letter(part: str) -> str:
    return {"down": "A", "up": "B"}[part]


def random_lora(
    layout: str = "diffusers", rank: int = 4, seed: int = 0, scale: float = 0.1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and what its layers change by if alpha is the rank."""
    generator = torch.Generator().manual_seed(seed)
    file, changes = {}, {}
    for layer, (_, _, outputs, inputs) in LAYERS.items():
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator) * scale
        file[LAYOUTS[layout](layer, "down")], file[LAYOUTS[layout](layer, "up")] = down, up
        changes[layer] = (up.double() @ down.double()).float()
    return file, changes


def changed_state(
    changes: Mapping[str, Tensor], factor: float = 1.0, state: Mapping[str, Tensor] = STATE
) -> dict[str, Tensor]:
    """The checkpoint with changes, by the formula."""
    expected = {name: tensor.float().clone() for name, tensor in state.items()}
    for layer, change in changes.items():
        name, start, outputs, _ = LAYERS[layer]
        expected[name][start : start + outputs] += factor * change
    return expected


def saved(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, path, metadata or None)
    return path


def loras_of(*texts: object, state: Mapping[str, Tensor] = STATE) -> tuple[Lora, ...]:
    return read_loras(tuple(map(str, texts)), state, SPEC, DIT)


def merged_with(*texts: object, state: Mapping[str, Tensor] = STATE) -> MergedTensors:
    loras = loras_of(*texts, state=state)
    return MergedTensors(state, [addition for lora in loras for addition in lora.additions])


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-5, atol=1e-5)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether the numbers are equal, also in the sign of zeros."""
    bits = [tensor.to(torch.float64).view(torch.int64) for tensor in (left, right)]
    return torch.equal(*bits)
