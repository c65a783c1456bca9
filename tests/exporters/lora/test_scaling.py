"""Alpha from tensors, metadata and adapter_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from goc_deploy.errors import ModelError
from tests.exporters.lora.files import (
    LAYERS,
    assert_close,
    changed_state,
    loras_of,
    merged_with,
    random_lora,
    saved,
)

CONFIG = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "lora_alpha": 6, "r": 4}


def peft_folder(folder: Path, **settings: Any) -> Path:
    saved(random_lora("peft")[0], folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings))
    return folder


def source_of(path: Path) -> str:
    return loras_of(path)[0].entry.alpha_source


def test_alpha_is_the_rank_if_the_file_has_none(tmp_path: Path) -> None:
    assert source_of(saved(random_lora()[0], tmp_path / "lora.safetensors")) == "rank"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_alpha_is_read_from_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, changes = random_lora("kohya")
    alphas = {
        f"{name.split('.')[0]}.alpha": torch.tensor(2, dtype=dtype)
        for name in tensors
        if "lora_up" in name
    }
    file = saved(tensors | alphas, tmp_path / "lora.safetensors")
    assert source_of(file) == "tensors"
    assert_close(merged_with(file), changed_state(changes, 2 / 4))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_alpha_is_read_from_the_metadata_of_diffusers(prefix: str, tmp_path: Path) -> None:
    tensors, changes = random_lora()
    text = json.dumps({f"{prefix}{name}": value for name, value in CONFIG.items()})
    file = saved(tensors, tmp_path / "lora.safetensors", lora_adapter_metadata=text)
    assert source_of(file) == "metadata"
    assert_close(merged_with(file), changed_state(changes, 6 / 4))


def test_alpha_is_read_from_the_configuration_of_peft(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    expected = changed_state(random_lora("peft")[1], 6 / 4)
    for path in (folder, folder / "adapter_model.safetensors"):
        assert source_of(path) == "adapter_config.json"
        assert_close(merged_with(path), expected)


def test_a_rank_stabilised_lora_is_divided_by_the_root_of_the_rank(tmp_path: Path) -> None:
    merged = merged_with(peft_folder(tmp_path / "peft", use_rslora=True))
    assert_close(merged, changed_state(random_lora("peft")[1], 6 / 2))


def test_a_pattern_gives_layers_their_own_alpha(tmp_path: Path) -> None:
    patterns = {"to_q": 1, "attn1.to_k": 2, "^proj_out_1": 3, "^to_v": 100}
    merged = merged_with(peft_folder(tmp_path / "peft", alpha_pattern=patterns))
    own = dict.fromkeys(LAYERS, 6.0) | {
        "transformer_blocks.0.attn1.to_q": 1.0,
        "transformer_blocks.0.attn1.to_k": 2.0,
        "proj_out_1": 3.0,
    }
    changes = {layer: own[layer] / 4 * c for layer, c in random_lora("peft")[1].items()}
    assert_close(merged, changed_state(changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "this is DoRA, which cannot be merged"),
        ({"peft_type": "LOHA"}, "a LoRA with peft_type 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"invented_in_2030": {"x": 1}}, "invented_in_2030"),
        ({"lora_alpha": -1}, "lora_alpha is -1, expected a positive number"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', expected a positive number"),
        ({"alpha_pattern": {"to_q": 0}}, "alpha_pattern is 0, expected a positive number"),
        ({"alpha_pattern": {"(a+)+": 1}}, "without regular expressions"),
        ({"alpha_pattern": [1]}, "without regular expressions"),
    ],
)
def test_settings_that_change_the_meaning_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        loras_of(peft_folder(tmp_path / "peft", **settings))


def test_settings_of_a_later_version_are_accepted_while_they_are_off(tmp_path: Path) -> None:
    loras_of(peft_folder(tmp_path / "peft", use_new_idea=False, new_config=None, new_list=[]))


@pytest.mark.parametrize("alpha", [0.0, -1.0, torch.nan, torch.inf])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: float, tmp_path: Path) -> None:
    tensors = random_lora()[0] | {"proj_out_1.alpha": torch.tensor(alpha)}
    with pytest.raises(ModelError, match=r"proj_out_1\.alpha must be one positive number"):
        loras_of(saved(tensors, tmp_path / "lora.safetensors"))
