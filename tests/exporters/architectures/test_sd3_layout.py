"""Layouts of Stable Diffusion 3: single files, position tables, public sizes, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.sd3 import FAMILY, SD3
from goc_deploy.exporters.architectures.sd3_layout import (
    TABLE,
    positions_from_table,
    state_from_authors,
)
from goc_deploy.exporters.architectures.sd3_spec import spec_from_config, spec_from_tensors, spec_of
from goc_deploy.exporters.checkpoint import load_checkpoint, of_diffusion_model
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import read_loras
from goc_deploy.exporters.schedulers import prediction_of, table_from_sampler
from goc_deploy.samplers.process import Process
from goc_deploy.size_inputs import sines
from goc_deploy.sizes import latent_shape
from goc_deploy.spec import ModelSpec

SPEC = spec_of(3, 3, 24, dual=(0, 1), qk_norm=True, table=9, grid=6, text=20, pooled=10)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def table_of(
    side: int, distance: float, origin: float, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A position table (1, side * side, width)."""
    axis = torch.from_numpy(sines(origin + distance * np.arange(side), width // 2))
    columns, rows = axis.expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side**2, width).to(dtype)


def state(spec: ModelSpec = SPEC) -> dict[str, Tensor]:
    """Random tensors in the layout of diffusers."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in FAMILY.shapes(spec).items()}
    assert spec.positions is not None
    tensors[TABLE] = table_of(spec.positions.table, 2 / 3, 0.0, spec.hidden)
    return tensors


def of_authors(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The same tensors in the layout of the authors' files, renamed by hand."""
    rest, file = dict(tensors), {"pos_embed": tensors[TABLE]}
    del rest[TABLE]

    def move(new: str, *old: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            parts = [rest.pop(f"{name}.{kind}") for name in old if f"{name}.{kind}" in rest]
            if parts:
                whole = torch.cat(parts)
                file[f"{new}.{kind}"] = whole.roll(len(whole) // 2, 0) if swap else whole

    move("x_embedder.proj", "pos_embed.proj")
    move("context_embedder", "context_embedder")
    for i, number in ((1, 0), (2, 2)):
        move(f"t_embedder.mlp.{number}", f"time_text_embed.timestep_embedder.linear_{i}")
        move(f"y_embedder.mlp.{number}", f"time_text_embed.text_embedder.linear_{i}")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    for i in range(depth):
        old, image, text = (
            f"transformer_blocks.{i}",
            f"joint_blocks.{i}.x_block",
            f"joint_blocks.{i}.context_block",
        )
        move(f"{image}.adaLN_modulation.1", f"{old}.norm1.linear")
        move(f"{text}.adaLN_modulation.1", f"{old}.norm1_context.linear", swap=i == depth - 1)
        for attn in ("attn", "attn2"):
            move(f"{image}.{attn}.qkv", *(f"{old}.{attn}.to_{part}" for part in "qkv"))
            move(f"{image}.{attn}.proj", f"{old}.{attn}.to_out.0")
            for part in "qk":
                move(f"{image}.{attn}.ln_{part}", f"{old}.{attn}.norm_{part}")
        move(f"{text}.attn.qkv", *(f"{old}.attn.add_{part}_proj" for part in "qkv"))
        move(f"{text}.attn.proj", f"{old}.attn.to_add_out")
        for part in "qk":
            move(f"{text}.attn.ln_{part}", f"{old}.attn.norm_added_{part}")
        for stream, ff in ((image, "ff"), (text, "ff_context")):
            move(f"{stream}.mlp.fc1", f"{old}.{ff}.net.0.proj")
            move(f"{stream}.mlp.fc2", f"{old}.{ff}.net.2")
    assert not rest
    return file


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_of_the_authors_holds_the_tensors_of_diffusers(tmp_path: Path) -> None:
    """The file has a VAE and an encoder too, as some public ones."""
    expected = state()
    file = {f"model.diffusion_model.{name}": t for name, t in of_authors(expected, 3).items()}
    file |= {"first_stage_model.decoder.conv_in.weight": torch.ones(2)}
    file |= {"text_encoders.clip_l.logit_scale": torch.ones(1)}
    save_file(file, tmp_path / "sd3.safetensors")
    read = of_diffusion_model(load_checkpoint(tmp_path / "sd3.safetensors"))
    tensors = SD3.in_public_layout(read.tensors)
    assert same(dict(tensors), expected)
    assert SD3.matches(list(tensors))
    spec = spec_from_tensors(tensors, None)
    SD3.check_tensors(tensors, spec)
    assert (spec.blocks, spec.heads, spec.qk_norm) == (SPEC.blocks, 3, True)
    assert (spec.caption_channels, spec.pooled_channels) == (20, 10)
    assert spec.positions == SPEC.positions


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_diffusers_reads_that_file_alike() -> None:
    utilities = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="diffusers comes with the judges extra"
    )
    file = of_authors(state(), 3)
    theirs = utilities.convert_sd3_transformer_checkpoint_to_diffusers(dict(file))
    assert same(state_from_authors(file), theirs)


def test_what_is_split_stays_a_view_of_the_file() -> None:
    file = of_authors(state(), 3)
    found = state_from_authors(file)
    whole = file["joint_blocks.0.x_block.attn.qkv.weight"]
    for part in "qkv":
        tensor = found[f"transformer_blocks.0.attn.to_{part}.weight"]
        assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_names_that_the_authors_do_not_have_are_refused() -> None:
    file = of_authors(state(), 3)
    file["joint_blocks.0.x_block.attn.extra.weight"] = torch.ones(2)
    del file["joint_blocks.1.context_block.mlp.fc1.bias"]
    with pytest.raises(ModelError, match=r"missing: .*ff_context.net.0.proj.bias.*attn.extra"):
        SD3.check_tensors(state_from_authors(file), SPEC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("distance", "origin"), [(2 / 3, 0.0), (0.25, -16.0), (1.0, 40.0), (0.5, -3.7)]
)
def test_the_positions_of_a_table_are_measured(
    distance: float, origin: float, dtype: torch.dtype
) -> None:
    found = positions_from_table(table_of(48, distance, origin, 64, dtype))
    assert found.table == 48
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    if (distance, origin) in ((0.25, -16.0), (1.0, 40.0)):
        tolerance = 0.0  # the simplest fractions that look alike
    assert found.stretch == pytest.approx(1 / distance, rel=tolerance)
    assert found.origin == pytest.approx(origin, abs=tolerance)


def learned(table: Tensor) -> Tensor:
    return table + 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))


def one_row_differs(table: Tensor) -> Tensor:
    changed = table.clone()
    changed[0, -3] += 0.02
    return changed


@pytest.mark.parametrize("change", [learned, one_row_differs, torch.zeros_like])
def test_a_learned_table_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    table = change(table_of(9, 2 / 3, 0.0, 24))
    with pytest.raises(ModelError, match=r"position table pos_embed.pos_embed was learned"):
        positions_from_table(table)


def test_a_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(ModelError, match=r"is \(1, 8, 24\), expected \(1, side \* side, width\)"):
        positions_from_table(torch.zeros(1, 8, 24))


def test_public_models_have_their_numbers_of_parameters() -> None:
    medium = spec_of(24, 24, 1536, dual=range(13), qk_norm=True, table=384)
    large = spec_of(38, 38, 2432, dual=(), qk_norm=True, table=192)
    old = spec_of(24, 24, 1536, dual=(), qk_norm=False, table=192)
    counts = []
    for spec in (medium, large, old):
        shapes = FAMILY.shapes(spec)
        counts.append(sum(math.prod(shape) for name, shape in shapes.items() if name != TABLE))
    assert [round(count / 1e6) for count in counts] == [2243, 8057, 2028]
    assert (medium.units, len(medium.features), large.units, len(large.features)) == (
        48, 61 + 46, 76, 76 + 74,
    )  # fmt: skip
    assert [run.count for run in medium.blocks] == [13, 10, 1]
    assert [run.count for run in large.blocks] == [37, 1]


def test_loras_name_layers_as_diffusers(tmp_path: Path) -> None:
    tensors, pairs = state(), {}
    layers = ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.attn2.to_out.0")
    for layer in layers:
        outputs, inputs = tensors[f"{layer}.weight"].shape
        pairs[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, inputs)
        pairs[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(pairs, tmp_path / "style.safetensors")
    (lora,) = read_loras([f"{tmp_path / 'style.safetensors'}:0.5"], tensors, SPEC, SD3)
    merged = MergedTensors(tensors, lora.additions)
    for layer in layers:
        down, up = (pairs[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
        expected = tensors[f"{layer}.weight"] + 0.5 * up @ down
        torch.testing.assert_close(merged[f"{layer}.weight"], expected)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("steps", [4, 10, 28, 50])
def test_the_schedule_of_the_folder_is_shifted_twice(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    process = Process(prediction_of(SCHEDULER, "here"), SCHEDULER)
    table = table_from_sampler("diffusers", steps, process)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(table.model, scheduler.sigmas.diff().numpy(), rtol=1e-4)
    np.testing.assert_allclose(table.latent, 1.0, rtol=1e-9)
    assert table.timesteps[-1] == pytest.approx(8.929, abs=1e-3)


def test_sizes_beyond_the_position_table_are_refused() -> None:
    with pytest.raises(UsageError, match=r"at most 144 per side, got \(160, 16\)"):
        latent_shape((160, 16), None, SPEC, 8)
    assert latent_shape((64, 48), None, SPEC, 8) == (16, 6, 8)


CONFIG: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 12,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 9,
    "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "FluxTransformer2DModel"}, "_class_name is"),
    "another norm": ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', only None or 'rms_norm'"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
    "channels out": ({"out_channels": 32}, "out_channels is 32, expected in_channels, 16"),
    "another text": ({"caption_projection_dim": 20}, "is 20, expected the width, 24"),
    "too small a table": (
        {"pos_embed_max_size": 5},
        r"sample_size is 12, expected a multiple of patch_size, 2, and at most 10",
    ),
    "too large a table": (
        {"pos_embed_max_size": 2000},
        "pos_embed_max_size is 2000, expected 2 to",
    ),
    "an odd width": (
        {"attention_head_dim": 7, "caption_projection_dim": 21},
        r"num_attention_heads \* attention_head_dim is 21, expected a width that 4 divides",
    ),
    "a dual block too far": (
        {"dual_attention_layers": [3]},
        r"dual_attention_layers is \[3\], expected different numbers below 3",
    ),
    "a dual block twice": ({"dual_attention_layers": [1, 1]}, "expected different numbers below 3"),
    "many blocks": ({"num_layers": 1001}, "num_layers is 1001, expected at most 1000"),
}


def test_a_config_tells_the_sizes() -> None:
    assert spec_from_config(CONFIG, "config.json") == SPEC


@pytest.mark.parametrize("change", REFUSED)
def test_settings_that_do_not_fit_are_refused_by_name(change: str) -> None:
    values, message = REFUSED[change]
    with pytest.raises(ModelError, match=message):
        spec_from_config({**CONFIG, **values}, "config.json")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="5 heads do not divide the width 24"):
        spec_from_tensors(state(), 5)


def test_tensors_that_tell_no_sizes_are_refused() -> None:
    tensors = state()
    del tensors[TABLE]
    with pytest.raises(ModelError, match=r"sizes cannot be read: 'pos_embed\.pos_embed'"):
        spec_from_tensors(tensors, None)
