"""PixArt-Sigma: recognized from files and folders, the latents of plain PyTorch, and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import pixart, pixart_sigma
from goc_deploy.exporters.architectures.dit_diffusers import position_table
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.model_folder import FolderModel, read_model_folder
from tests import pixart_reference
from tests.exporters.architectures.test_pixart import CONFIG, arrays, model_of, save_folder
from tests.pixart_reference import eager_latents, random_state
from tests.reference import relative_l2

SIDE, SCALE = 12, 0.1875  # a model for 512 pixels has a side of 64 and a scale of 1
SPEC = replace(
    pixart_reference.SPEC, depth=3, hidden=72, mlp_hidden=288, grid=6, caption_tokens=300,
    told_size=0, architecture="pixart-sigma",
)  # fmt: skip
CHANGES = {
    "attention_head_dim": 24,
    "cross_attention_dim": 72,
    "interpolation_scale": SCALE,
    "num_layers": 3,
    "sample_size": SIDE,
    "use_additional_conditions": False,
}
PLANS = ("none", "fora:2+gc:1.0")


def sigma_state() -> dict[str, torch.Tensor]:
    """A checkpoint in the public layout, with its position table and its null caption."""
    return random_state(SPEC) | {"pos_embed": position_table(SPEC, SCALE)}


def long_arrays(prompts: int = 2) -> dict[str, np.ndarray]:
    """Random captions of 300 tokens, of which 251 and 9 are real, and a negative one of 1."""
    given = arrays(SPEC, prompts)
    lengths = np.array([251, 9, 120][:prompts])[:, None]
    given["prompt_attention_mask"] = (np.arange(300) < lengths).astype(np.int64)
    given["negative_prompt_attention_mask"] = (np.arange(300) < 1).astype(np.int64)[None]
    return given


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigma") / "PixArt-Sigma-tiny.pth"
    torch.save({"state_dict": sigma_state()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a PixArtSigmaPipeline; its transformer's is below it."""
    save_folder(tmp_path / "pipeline" / "transformer", sigma_state(), SPEC, **CHANGES)
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text('{"_class_name": "PixArtSigmaPipeline"}')
    return index.parent


def test_a_checkpoint_draws_what_pytorch_draws(checkpoint: Path, tmp_path: Path) -> None:
    more = {"num_heads": 3, "sampler": "dpm++", "steps": 6, "max_batch": 2}
    manifest = goc_deploy.export(checkpoint, tmp_path / "engine", plans=PLANS, **more)
    assert manifest.model == SPEC
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4
    given = long_arrays()
    noise = np.random.default_rng(3).standard_normal((2, 4, SIDE, SIDE)).astype(np.float32)
    for plan in PLANS:
        with goc_deploy.load(tmp_path / "engine", plan=plan) as pipe:
            captions, compiled = prompt_embeds_from_arrays(given, SPEC, "given"), pipe.plan
            found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5)
        expected = eager_latents(
            model_of(sigma_state(), given, SPEC), compiled.schedule, compiled.sampler, noise, 4.5
        )
        assert relative_l2(found.latents, expected) < 1e-4, plan
        assert found.report["cfg_channels"] == 4


def test_scores_in_bf16_are_scaled_exactly(tmp_path: Path) -> None:
    """The square root of a head width of 24 or 72 is no bf16 number, as that of 16 and 64 is."""
    torch.save({"state_dict": random_state(replace(SPEC, depth=1))}, tmp_path / "model.pth")
    more = {"num_heads": 3, "plans": ["none"], "steps": 2, "precision": "bf16"}
    manifest = goc_deploy.export(tmp_path / "model.pth", tmp_path / "engine", **more)
    errors = {unit.name: unit.relative_l2 or 0 for unit in manifest.graphs}
    assert max(errors[f"block_00_{branch}"] for branch in SPEC.branches) < 1e-5


def test_folders_and_checkpoints_hold_the_same_model(folder: Path) -> None:
    state = sigma_state()
    assert pixart.spec_from_tensors(state, 3) == SPEC
    assert pixart_sigma.spec_from_tensors(state, 3) == SPEC
    found = read_model_folder(folder, ARCHITECTURES)
    assert found.spec == SPEC
    pixart_sigma.check_tensors(found.checkpoint.tensors, found.spec)
    assert found.checkpoint.tensors.keys() == state.keys() - {pixart.NULL_CAPTION}
    for name, tensor in found.checkpoint.tensors.items():
        assert torch.equal(tensor, state[name]), name


def test_without_a_null_caption_or_a_pipeline_the_user_names_the_model(folder: Path) -> None:
    """An alpha for 512 pixels has the same settings and tensors, and shorter captions."""
    state = {name: t for name, t in sigma_state().items() if name != pixart.NULL_CAPTION}
    assert pixart.spec_from_tensors(state, 3).caption_tokens == 120
    assert pixart_sigma.spec_from_tensors(state, 3) == SPEC
    alone = folder / "transformer"
    with pytest.raises(ModelError, match=r"interpolation_scale is 0.1875, .*`model=pixart-sigma`"):
        read_model_folder(alone, ARCHITECTURES)
    assert read_named(alone).spec == SPEC
    told = {**CONFIG, **CHANGES, "sample_size": 64, "interpolation_scale": 1}
    (alone / "config.json").write_text(json.dumps(told))
    assert read_model_folder(alone, ARCHITECTURES).spec.caption_tokens == 120


def read_named(folder: Path) -> FolderModel:
    return read_model_folder(folder, {"pixart-sigma": pixart_sigma.PIXART_SIGMA})


@pytest.mark.parametrize(("side", "scale"), [(32, 0.5), (64, 1), (128, 2), (256, 4), (96, 1.5)])
def test_positions_are_measured_in_tokens_of_a_model_for_512_pixels(
    side: int, scale: float
) -> None:
    config = {**CONFIG, **CHANGES, "sample_size": side, "interpolation_scale": scale}
    spec = pixart_sigma.spec_from_config(config, "")
    assert (spec.tokens, spec.told_size, spec.caption_tokens) == ((side // 2) ** 2, 0, 300)
    table = position_table(spec, spec.side / pixart_sigma.BASE_SIDE)[0]
    last = math.sin((spec.grid - 1) / scale)  # the fastest sine of the last column and row
    for token, column in ((spec.grid - 1, 0), (-1, 0), (-1, spec.hidden // 2)):
        assert table[token, column].item() == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation_scale": 1}, "interpolation_scale is 1.0, only 0.1875 is supported for a"),
        ({"interpolation_scale": None}, "interpolation_scale is None, only 0.1875 is supported"),
        ({"interpolation_scale": "1"}, r"\$\.interpolation_scale: expected float \| null, got '1'"),
        (
            {"use_additional_conditions": True},
            "use_additional_conditions is True with sample_size 12, only False is supported",
        ),
        (
            {"use_additional_conditions": None, "sample_size": 128, "interpolation_scale": 2},
            "use_additional_conditions is None with sample_size 128, only False is supported",
        ),
        ({"use_additional_conditions": 0}, r"\$\.use_additional_conditions: expected bool \| null"),
        ({"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero', only 'ada_norm_single'"),
        ({"norm_type": "rms_norm"}, "norm_type is 'rms_norm', only 'ada_norm_single'"),
        ({"sample_size": 13}, "sample_size must be a multiple of patch_size, got 13 and 2"),
        (
            {"caption_channels": 24},
            "of another shape: y_embedder.y_proj.fc1.weight .72, 20., expected .72, 24.",
        ),
        ({"caption_channels": None}, r"\$\.caption_channels: expected int, got None"),
        ({"kv_compress": True}, "setting 'kv_compress' that this version does not know"),
        ({"num_layers": 2}, "unexpected: transformer_blocks.2"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    config = {**CONFIG, **CHANGES, **changes}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        read_and_check(folder)


def read_and_check(folder: Path) -> None:
    found = read_model_folder(folder, ARCHITECTURES)
    pixart_sigma.check_tensors(found.checkpoint.tensors, found.spec)


def test_the_pipeline_of_another_family_is_refused(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ModelError, match="holds a PixArtAlphaPipeline; this version exports "):
        read_named(folder)
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ModelError, match="is of a PixArtTransformer2DModel with norm_type"):
        read_model_folder(folder, ARCHITECTURES)


@pytest.mark.parametrize("layer", ["sr", "norm", "q_norm", "k_norm"])
def test_compressed_keys_and_normalized_queries_are_refused(layer: str) -> None:
    name = f"blocks.2.attn.{layer}.weight"
    with pytest.raises(ModelError, match=f"has {name}; self-attention that compresses keys"):
        pixart_sigma.check_tensors({**sigma_state(), name: torch.ones(72)}, SPEC)


def test_checkpoints_that_are_no_sigma_are_refused() -> None:
    alpha = random_state()
    with pytest.raises(ModelError, match=r"has csize_embedder, .* choose `model=pixart`"):
        pixart_sigma.spec_from_tensors(alpha, 3)
    bare = {name: tensor for name, tensor in sigma_state().items() if name != "pos_embed"}
    with pytest.raises(ModelError, match=r"no position table .pos_embed., so the size of its"):
        pixart_sigma.spec_from_tensors(bare, 3)
