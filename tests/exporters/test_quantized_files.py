"""Files whose weights were quantised elsewhere: float8 with scales is read, the rest is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from goc_deploy.api.exporting import export_with
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.flux import FLUX
from goc_deploy.exporters.checkpoint import check_values, load_checkpoint, of_float8
from goc_deploy.exporters.quantized_files import ScaledTensors
from goc_deploy.exporters.source import read_model
from goc_deploy.options import ExportOptions
from tests.conftest import GOLDEN
from tests.exporters.architectures.test_flux import BIG_HEADS, authors_state, judge_of

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)
MATRICES = [name for name in STATE if name.startswith("blocks") and STATE[name].ndim == 2]


def scaled_state(state: dict[str, Tensor], matrices: list[str], suffix: str) -> dict[str, Tensor]:
    """The tensors of a file in ComfyUI's layout."""
    file = dict(state)
    for name in matrices:
        scale = state[name].float().abs().max() / 448
        file[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
        file[name.removesuffix(".weight") + suffix] = scale.reshape(1)
    return file


def expected(file: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """The values that a file stands for."""
    return {
        name: tensor.float() * file[name.removesuffix(".weight") + suffix]
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in file.items()
        if not name.endswith((suffix, ".scale_input", "scaled_fp8", ".comfy_quant"))
    }


def assert_read(path: Path, wanted: dict[str, Tensor]) -> None:
    checkpoint = of_float8(load_checkpoint(path))
    check_values(checkpoint)
    found = ScaledTensors(checkpoint.tensors, checkpoint.scales)
    assert found.keys() == wanted.keys()
    assert len(found) == len(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {t.dtype for t in checkpoint.tensors.values()} >= {torch.float8_e4m3fn}


@pytest.mark.parametrize("entries", [0, 2])
def test_a_marked_file_with_scales_is_read(entries: int, tmp_path: Path) -> None:
    file = scaled_state(STATE, MATRICES, ".scale_weight")
    file[MATRICES[0].removesuffix("weight") + "scale_input"] = torch.ones(1)
    file["scaled_fp8"] = torch.zeros(entries).to(torch.float8_e4m3fn)
    save_file(file, tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors", expected(file, ".scale_weight"))


def test_a_described_file_is_read(tmp_path: Path) -> None:
    file = scaled_state(STATE, MATRICES, ".weight_scale")
    described = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode())).byte()
    file |= {name.removesuffix("weight") + "comfy_quant": described.clone() for name in MATRICES}
    save_file(file, tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors", expected(file, ".weight_scale"))


def test_a_scale_per_row_and_a_weight_without_scale_are_read(tmp_path: Path) -> None:
    values = torch.arange(1, 9.0).reshape(4, 2)
    file = {
        "a.weight": values.to(torch.float8_e4m3fn),
        "a.scale_weight": torch.tensor([[1.0], [2], [4], [8]]),
        "b.bias": values[0].to(torch.float8_e4m3fn),
    }
    save_file(file, tmp_path / "model.safetensors")
    wanted = {"a.weight": values * file["a.scale_weight"], "b.bias": values[0]}
    assert_read(tmp_path / "model.safetensors", wanted)


def test_layers_that_authors_join_keep_their_scales(tmp_path: Path) -> None:
    state = authors_state(judge_of(**BIG_HEADS, guidance_embeds=False).state_dict())
    file = scaled_state(state, [n for n in state if state[n].ndim == 2], ".scale_weight")
    save_file(file, tmp_path / "model.safetensors")
    found = read_model(tmp_path / "model.safetensors", ExportOptions()).checkpoint
    values = ScaledTensors(found.tensors, found.scales)
    wanted = FLUX.in_public_layout(expected(file, ".scale_weight"))
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    swapped = "norm_out.linear.weight"
    assert found.tensors[swapped].dtype == torch.float8_e4m3fn


def test_a_float8_file_is_exported_as_the_values_that_it_stands_for(tmp_path: Path) -> None:
    file = scaled_state(STATE, MATRICES, ".scale_weight")
    file["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}
    save_file(prefixed, tmp_path / "float8.safetensors")
    save_file(expected(file, ".scale_weight"), tmp_path / "float32.safetensors")
    options = ExportOptions(num_heads=4, plans=("none",))
    manifests = [
        export_with(tmp_path / f"{name}.safetensors", tmp_path / name, options)[0]
        for name in ("float8", "float32")
    ]
    assert manifests[0].files == manifests[1].files
    assert manifests[0].provenance["checkpoint_dtypes"]["float8_e4m3fn"] == len(MATRICES)


ONE, TWO = torch.ones(1), torch.full((1,), 2.0)
FLOAT8 = torch.ones(4, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": FLOAT8, "scaled_fp8": ONE}, r"a.weight is float8 but has no .scale_weight"),
        ({"a.weight": ONE, "a.scale_weight": TWO}, r"scales, such as of a.weight, but no float8"),
        (
            {"a.weight": FLOAT8, "b.scale_weight": TWO},
            r"b.weight has a scale, but there is no such",
        ),
        (
            {"a.weight": FLOAT8, "b.weight": ONE, "b.scale_weight": TWO},
            r"b.weight has a scale but is float32",
        ),
        (
            {"a.weight": FLOAT8, "a.scale_weight": torch.ones(2)},
            r"scale of a.weight is \(2,\), expected one value, or one per row of \(4, 2\)",
        ),
        (
            {"a.weight": FLOAT8, "a.scale_weight": 0 * ONE},
            r"scale of a.weight is not a positive number",
        ),
        (
            {"a.weight": FLOAT8, "a.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'))},
            r"in the format mxfp8 \(tensor a.comfy_quant\), which is not read",
        ),
        (
            {"a.weight": FLOAT8, "a.comfy_quant": torch.tensor(list(b"[]"))},
            r"a.comfy_quant is not the description of a format",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        of_float8(load_checkpoint(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.weight.quant_state.bitsandbytes__nf4", r"bitsandbytes \(nf4 or fp4\)"),
        ("a.SCB", r"bitsandbytes \(int8\)"),
        ("a.wscales", "SVDQuant of nunchaku"),
        ("a.g_idx", "GPTQ"),
        ("a.qzeros", "AWQ"),
        ("a.weight_scale_2", "nvfp4"),
        ("a.weight._data", "optimum-quanto"),
    ],
)
def test_other_formats_are_named(name: str, form: str, tmp_path: Path) -> None:
    save_file({name: ONE, "b.weight": ONE.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"format {form} \(tensor {name}\), which is not read"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    with pytest.raises(ModelError, match="format GGUF"):
        load_checkpoint(tmp_path / "model.gguf")
