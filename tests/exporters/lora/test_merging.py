"""Laws of merging, and its memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from goc_deploy.errors import ModelError
from goc_deploy.exporters.lora.merging import Addition, MergedTensors
from goc_deploy.exporters.units import Slab
from tests.exporters.lora.files import (
    LAYERS,
    LAYOUTS,
    STATE,
    assert_close,
    changed_state,
    merged_with,
    random_lora,
    same_bits,
    saved,
)

CHANGED = {name for name, *_ in LAYERS.values()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_merged_as_the_formula_says(layout: str, tmp_path: Path) -> None:
    tensors, changes = random_lora(layout)
    merged = merged_with(f"{saved(tensors, tmp_path / 'lora.safetensors')}:0.5")
    assert_close(merged, changed_state(changes, 0.5))
    assert all(merged[name] is STATE[name] for name in STATE.keys() - CHANGED)


def test_layers_of_the_public_layout_are_merged_too(tmp_path: Path) -> None:
    down, up = torch.randn(2, 48), torch.randn(144, 2)
    names = ("blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight")
    file = saved(dict(zip(names, (down, up), strict=True)), tmp_path / "lora.safetensors")
    found = merged_with(file)["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(found, STATE["blocks.0.attn.qkv.weight"] + up @ down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_lora_that_is_zero_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    state["blocks.0.attn.qkv.weight"][0] = -0.0
    tensors = {
        name: torch.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in random_lora()[0].items()
    }
    merged = merged_with(saved(tensors, tmp_path / "lora.safetensors"), state=state)
    assert all(same_bits(merged[name], tensor) for name, tensor in state.items())


def test_two_loras_add_up_in_any_order(tmp_path: Path) -> None:
    (first, change), (second, other) = random_lora(seed=1), random_lora("peft", rank=3, seed=2)
    texts = (
        f"{saved(first, tmp_path / 'first.safetensors')}:0.7",
        f"{saved(second, tmp_path / 'second.safetensors')}:-1.5",
    )
    merged, turned = merged_with(*texts), merged_with(*reversed(texts))
    assert_close(merged, changed_state(other, -1.5, changed_state(change, 0.7)))
    assert all(same_bits(merged[name], turned[name]) for name in STATE)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in STATE.items()}
    tensors, changes = random_lora(scale=1e-5)
    merged = merged_with(saved(tensors, tmp_path / "lora.safetensors"), state=state)
    name = "blocks.1.attn.proj.weight"
    assert merged[name].dtype == torch.float32
    expected = changed_state(changes, state=state)[name]
    torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-8)


def test_a_merged_tensor_is_not_kept(tmp_path: Path) -> None:
    merged = merged_with(saved(random_lora()[0], tmp_path / "lora.safetensors"))
    assert all(weakref.ref(merged[name])() is None for name in CHANGED)


def test_memory_is_that_of_one_tensor() -> None:
    side, count = 1024, 24
    tensors = {str(i): torch.randn(side, side) for i in range(count)}
    matrix = torch.randn(side, 4)
    additions = [Addition(Slab(name), matrix.T, matrix, 1.0) for name in tensors]
    merged, before, most = MergedTensors(tensors, additions), _anonymous_bytes(), 0
    for name in merged:
        kept = merged[name]
        most = max(most, _anonymous_bytes() - before)
        del kept
    assert most < 6 * 4 * side**2


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_a_sum_that_is_not_finite_is_refused() -> None:
    huge = torch.full((2, 2), 3e38)
    merged = MergedTensors({"w": huge}, [Addition(Slab("w"), torch.eye(2), huge, 1.0)])
    with pytest.raises(ModelError, match="w is not finite any more when `loras` are added"):
        merged["w"]
