"""The VAE of Qwen-Image: the same pixels as diffusers, and refusals by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.errors import ModelError
from goc_deploy.exporters.companions.qwen_vae import read_qwen_vae_folder
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2

CONFIG: dict[str, Any] = {
    "base_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "z_dim": 5,
    "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0],
    "latents_std": [1.5, 0.5, 1.0, 2.0, 0.7],
}
SPEC = ModelSpec(1, 24, 2, 48, 2, 4, 5, 10, False)
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random VAE of diffusers, and its folder."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(3)
    judge = diffusers.AutoencoderKLQwenImage(**CONFIG).eval()
    for parameter in judge.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    judge.save_pretrained(folder)
    return judge, folder


def judged(judge: Any, latents: np.ndarray) -> np.ndarray:
    """What the pipeline of diffusers makes of latents (N, C, H, W): (N, channels, H, W)."""
    std, mean = (
        torch.tensor(CONFIG[f"latents_{what}"]).reshape(1, -1, 1, 1, 1) for what in ("std", "mean")
    )
    with torch.inference_mode():
        frames = judge.decode(torch.from_numpy(latents)[:, :, None] * std + mean).sample
    pixels: np.ndarray = frames[:, :, 0].numpy()
    return pixels


def test_pixels_are_those_of_diffusers(vae: tuple[Any, Path]) -> None:
    judge, folder = vae
    found = read_qwen_vae_folder(folder, SPEC)
    module = found.decoder().eval()
    module.load_state_dict(found.checkpoint.tensors)
    latents = np.random.default_rng(1).standard_normal((3, 5, 7, 6)).astype(np.float32)
    with torch.inference_mode():
        pixels = module(torch.from_numpy(latents)).numpy()
    assert pixels.shape == (3, 3, 28, 24)
    assert relative_l2(pixels, judged(judge, latents)) < 1e-5


def test_an_engine_directory_draws_these_images(vae: tuple[Any, Path], tmp_path: Path) -> None:
    judge, folder = vae
    torch.save(random_state(SPEC, 3), tmp_path / "dit.pt")
    goc_deploy.export(
        tmp_path / "dit.pt", tmp_path / "e", num_heads=2, vae=folder, steps=2, plans=["none"]
    )
    with goc_deploy.load(tmp_path / "e") as pipe:
        result = pipe.generate([1, 2], seed=0)
    assert result.images is not None
    expected = pixels_to_uint8(judged(judge, result.latents))
    assert result.images.shape == (2, 32, 32, 3)
    assert np.abs(result.images.astype(int) - expected.astype(int)).max() <= 1


def test_a_model_of_videos_is_refused(vae: tuple[Any, Path]) -> None:
    video = replace(SPEC, grid=(3, 4, 4), max_grid=(3, 4, 4))
    with pytest.raises(ModelError, match="is a VAE of images, but the model draws videos"):
        read_qwen_vae_folder(vae[1], video)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "levels of Wan 2.2": ({"is_residual": True}, "are settings of Wan 2.2"),
    "attention in levels": ({"attn_scales": [0.5]}, r"attn_scales is \[0.5\], only \[\]"),
    "other channels": ({"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
                       "decodes 4 channels but the model makes 5"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
    "other widths": ({"base_dim": 8}, "of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_folders_that_do_not_fit_are_refused_by_name(
    vae: tuple[Any, Path], tmp_path: Path, change: str
) -> None:
    values, message = CHANGES[change]
    config = json.loads((vae[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(vae[1] / weights)
    with pytest.raises(ModelError, match=message):
        read_qwen_vae_folder(tmp_path, SPEC)
