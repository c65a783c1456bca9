"""Files with the names of Wan's authors are read as the model that diffusers saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import goc_deploy
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.wan import WAN
from goc_deploy.exporters.architectures.wan_authors import state_from_authors
from goc_deploy.exporters.architectures.wan_diffusers import shapes_from_spec, spec_of
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import read_loras
from goc_deploy.exporters.source import read_model
from goc_deploy.options import ExportOptions

SPEC = spec_of(2, 3, 24, ffn=100, channels=16, text=32)
# Part of a name in diffusers -> the same by the authors.
NAMES = {
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^proj_out": "head.head",
    r"^scale_shift_table": "head.modulation",
    r"scale_shift_table$": "modulation",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0": ".o",
    r"\.to_([qkv])": r".\1",
    r"\.norm2": ".norm3",
    r"\.ffn\.net\.0\.proj": ".ffn.0",
    r"\.ffn\.net\.2": ".ffn.2",
}


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_from_spec(SPEC)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def of_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, theirs in NAMES.items():
            name = re.sub(pattern, theirs, name)
        renamed[name] = tensor
    return renamed


def write(tensors: dict[str, Tensor], path: Path, wrapper: str = "") -> Path:
    named = {f"{wrapper}{name}": tensor for name, tensor in tensors.items()}
    if path.suffix == ".pth":
        torch.save(named, path)
    else:
        save_file(named, path)
    return path


@pytest.mark.parametrize("file", ["wan.pth", "wan.safetensors"])
@pytest.mark.parametrize("wrapper", ["", "model.diffusion_model."])
def test_a_file_of_the_authors_holds_the_model_of_diffusers(
    file: str, wrapper: str, tmp_path: Path
) -> None:
    tensors = of_authors(state())
    assert {"blocks.1.self_attn.q.weight", "blocks.0.norm3.bias", "head.modulation"} < set(tensors)
    options = ExportOptions(num_heads=3)
    found = read_model(write(tensors, tmp_path / file, wrapper), options)
    expected = read_model(write(state(), tmp_path / f"same-{file}"), options)
    assert found.spec == expected.spec
    assert (found.spec.hidden, found.spec.depth, found.spec.architecture) == (72, 2, "wan")
    assert found.checkpoint.tensors.keys() == expected.checkpoint.tensors.keys()
    for name, tensor in expected.checkpoint.tensors.items():
        assert torch.equal(found.checkpoint.tensors[name], tensor)
    WAN.check_tensors(found.checkpoint.tensors, found.spec)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_names_are_those_to_which_diffusers_converts() -> None:
    utils: Any = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="diffusers comes with the judges extra"
    )
    tensors = of_authors(state())
    found = state_from_authors(tensors)
    expected = utils.convert_wan_transformer_to_diffusers(dict(tensors))
    assert found.keys() == expected.keys()
    assert all(found[name] is tensor for name, tensor in expected.items())


def test_a_lora_may_have_the_names_of_the_authors(tmp_path: Path) -> None:
    """In the layouts of diffusers and ComfyUI, and of kohya, whose names have no dots."""
    generator, tensors = torch.Generator().manual_seed(1), state()
    pairs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            layer, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
            pairs[f"{layer}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
            pairs[f"{layer}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
    renamed = of_authors(pairs)
    assert len(pairs) == 2 * (10 * SPEC.depth + 6)
    assert {"blocks.1.self_attn.q.lora_up.weight", "head.head.lora_up.weight"} < set(renamed)
    loras = {
        "diffusers": {f"transformer.{name}": tensor for name, tensor in pairs.items()},
        "comfy": {f"diffusion_model.{name}": tensor for name, tensor in renamed.items()},
        "kohya": {f"lora_unet_{_underscored(name)}": tensor for name, tensor in renamed.items()},
    }
    merged = []
    for name, lora in loras.items():
        file = write(lora, tmp_path / f"{name}.safetensors")
        (found,) = read_loras([str(file)], tensors, SPEC, WAN)
        merged.append(MergedTensors(tensors, found.additions))
    for name, tensor in tensors.items():
        down = pairs.get(name.replace(".weight", ".lora_down.weight"))
        up = pairs.get(name.replace(".weight", ".lora_up.weight"))
        changed = tensor if down is None or up is None else tensor + up @ down
        for found in merged:
            torch.testing.assert_close(found[name], changed, rtol=1e-5, atol=1e-5)


def _underscored(name: str) -> str:
    """A name of kohya: dots remain before the name of the matrix only."""
    layer, matrix, kind = name.rsplit(".", 2)
    return f"{layer.replace('.', '_')}.{matrix}.{kind}"


def test_a_model_that_starts_from_a_picture_is_refused(tmp_path: Path) -> None:
    tensors = of_authors(state())
    tensors["blocks.0.cross_attn.k_img.weight"] = torch.zeros(72, 72)
    path = write(tensors, tmp_path / "i2v.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.0\.cross_attn\.k_img\.weight"):
        goc_deploy.export(path, tmp_path / "e", num_heads=3, plans=["none"], steps=2)
