"""The same weights as PEFT merges, for models of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import read_loras
from goc_deploy.exporters.model_folder import FolderModel, read_model_folder
from tests.exporters.architectures.test_diffusers_folder import CONFIG as DIT_CONFIG
from tests.exporters.architectures.test_pixart import CONFIG as PIXART_CONFIG
from tests.exporters.architectures.test_wan import CONFIG as WAN

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
peft = pytest.importorskip("peft", reason="peft comes with the judges extra")

WAN_CONFIG = {"_class_name": "WanTransformer3DModel", **WAN}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4},
    "all": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "patterns": {
        "target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2"],
        "lora_alpha": 12,
        "rank_pattern": {"to_q": 2, "attn1.to_k": 5},
        "alpha_pattern": {"to_v": 3, "0.attn1.to_q": 1},
        "use_rslora": True,
    },
}


def read(folder: Path) -> FolderModel:
    return read_model_folder(folder, ARCHITECTURES)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "config", [DIT_CONFIG, PIXART_CONFIG, WAN_CONFIG], ids=["dit", "pixart", "wan"]
)
def test_weights_are_those_that_peft_merges(
    config: dict[str, Any], settings: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = getattr(diffusers, config["_class_name"]).from_config(config)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(**SETTINGS[settings], init_lora_weights=False)
    changed = peft.get_peft_model(model, lora)
    changed.save_pretrained(tmp_path / "lora")
    changed.merge_and_unload().save_pretrained(tmp_path / "merged")

    base, expected = read(tmp_path / "base"), read(tmp_path / "merged").checkpoint.tensors
    family = ARCHITECTURES[base.spec.architecture]
    tensors = base.checkpoint.tensors
    loras = read_loras((str(tmp_path / "lora"),), tensors, base.spec, family)
    found = MergedTensors(tensors, loras[0].additions)
    assert found.keys() == expected.keys()
    assert any(not torch.equal(tensors[name], expected[name]) for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
