"""Files and scales that are refused, and what the manifest records."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from goc_deploy.errors import GocError, ModelError, SafetyError, UsageError
from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.architectures.sit import SIT
from goc_deploy.exporters.lora.reading import digest_of_merge, read_loras
from tests.exporters.lora.files import (
    SPEC,
    STATE,
    assert_close,
    changed_state,
    loras_of,
    merged_with,
    random_lora,
    saved,
)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return saved(random_lora()[0], tmp_path / "lora.safetensors")


def test_the_manifest_records_file_scale_and_digest(lora: Path) -> None:
    (found,) = loras_of(f"{lora}:-0.25")
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert (found.entry.file, found.entry.scale) == ("lora.safetensors", -0.25)
    assert (found.entry.sha256, found.entry.ranks, found.entry.layers) == (digest, (4,), 8)


def test_a_torch_file_and_a_folder_are_read(tmp_path: Path) -> None:
    tensors, changes = random_lora()
    torch.save(tensors, tmp_path / "lora.pt")
    saved(tensors, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    for path in (tmp_path / "lora.pt", tmp_path / "folder"):
        assert_close(merged_with(path), changed_state(changes))


def test_a_colon_in_a_file_name_is_no_scale(tmp_path: Path) -> None:
    path = saved(random_lora()[0], tmp_path / "lora:2")
    assert [loras_of(text)[0].entry.scale for text in (path, f"{path}:3")] == [1.0, 3.0]


@pytest.mark.parametrize("scale", ["0", "-0.0", "nan", "inf", "", "strong", "1,5"])
def test_a_scale_that_is_no_number_is_refused(scale: str, lora: Path) -> None:
    with pytest.raises(UsageError, match="the scale must be a finite number other than 0"):
        loras_of(f"{lora}:{scale}")


def test_the_same_file_twice_is_refused(lora: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(lora.read_bytes())
    with pytest.raises(UsageError, match=r"the same LoRA as lora\.safetensors; give it once"):
        loras_of(lora, f"{copy}:0.5")


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    tensors = random_lora()[0]
    matrix, layer = torch.ones(4, 4), "transformer.double_blocks.3"
    tensors |= {f"{layer}.lora_{part}.weight": matrix for part in "AB"}
    with pytest.raises(ModelError, match=r"1 of the 9 layers .* \(double_blocks\.3\)"):
        loras_of(saved(tensors, tmp_path / "lora.safetensors"))


def test_embedders_that_diffusers_has_per_block_are_refused_if_they_are_shared(
    tmp_path: Path,
) -> None:
    layer = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"
    tensors = {f"{layer}.lora_{part}.weight": torch.ones(48, 48) for part in "AB"}
    file = saved(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="no linear layers that the export has by themselves"):
        loras_of(file)
    own = replace(SPEC, block_embedders=True)
    state = STATE | {"blocks.0.t_embedder.mlp.2.weight": torch.ones(48, 48)}
    assert read_loras((str(file),), state, own, DIT)


def test_another_width_is_refused(tmp_path: Path) -> None:
    wide = {name: torch.cat([t, t], dim=int("A.w" in name)) for name, t in random_lora()[0].items()}
    with pytest.raises(
        ModelError, match="does not fit this model: proj_out_1 has 96 outputs and 48"
    ):
        loras_of(saved(wide, tmp_path / "lora.safetensors"))


def test_a_family_that_diffusers_does_not_have_takes_its_own_names(tmp_path: Path) -> None:
    names = ("blocks.0.attn.proj.lora_A.weight", "blocks.0.attn.proj.lora_B.weight")
    own = saved(dict.fromkeys(names, torch.ones(48, 48)), tmp_path / "own.safetensors")
    other = saved(random_lora()[0], tmp_path / "other.safetensors")
    assert read_loras((str(own),), STATE, SPEC, SIT)[0].entry.layers == 1
    with pytest.raises(ModelError, match="does not fit"):
        read_loras((str(other),), STATE, SPEC, SIT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tensors = random_lora()[0]
    tensors["transformer.proj_out_1.lora_A.weight"][0, 0] = value
    with pytest.raises(ModelError, match=r"infinite values in transformer\.proj_out_1\.lora_A"):
        loras_of(saved(tensors, tmp_path / "lora.safetensors"))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    torch.save({"a.lora_A.weight": Malicious(tmp_path / "made")}, tmp_path / "lora.bin")
    with pytest.raises(SafetyError, match="asks to run code"):
        loras_of(tmp_path / "lora.bin")
    assert not (tmp_path / "made").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("a text that is no LoRA")
    for text in (tmp_path / "empty", tmp_path / "text.safetensors", tmp_path / "none:0.5"):
        with pytest.raises(GocError):
            loras_of(text)


def test_the_digest_tells_files_and_scales_apart(lora: Path, tmp_path: Path) -> None:
    other = saved(random_lora(seed=1)[0], tmp_path / "other.safetensors")
    texts = [(), (lora,), (f"{lora}:2",), (other,), (lora, other)]
    digests = [digest_of_merge("0" * 64, loras_of(*each)) for each in texts]
    assert digests[0] == "0" * 64
    assert len(set(digests)) == len(texts)
    assert digest_of_merge("0" * 64, loras_of(other, lora)) == digests[-1]
