"""Videos of a Wan: those that the VAE of diffusers decodes, as files, and refusals."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.api.run import run
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engines.tensorrt.jobs import wanted_engines
from goc_deploy.errors import EnvironmentUnsupportedError, ModelError, UsageError
from goc_deploy.exporters.architectures.wan_diffusers import spec_of
from goc_deploy.options import EngineOptions, RunOptions, ShardOptions
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.sharded.run import run_sharded
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.exporters.architectures.test_wan import arrays, captions_of, noise_of, random_model
from tests.exporters.companions.test_wan_vae import CONFIG as VAE
from tests.exporters.companions.test_wan_vae import judge_of, judged

IMAGES = ModelSpec(1, 48, 3, 96, 2, 4, 16, 10, False)
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def with_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random VAE of diffusers, and the engine directory of the model with its decoder."""
    folder = tmp_path_factory.mktemp("with_vae")
    vae = judge_of(VAE, folder / "vae")
    random_model().save_pretrained(folder / "transformer")
    goc_deploy.export(
        folder / "transformer", folder / "engine", plans=["fora:2"], steps=4, max_batch=2,
        size=(48, 32), frames=5, vae=folder / "vae",
    )  # fmt: skip
    return vae, folder / "engine"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A file of two captions."""
    path = tmp_path / "captions.npz"
    np.savez(path, **arrays(spec_of(3, 3, 24, ffn=100, channels=16, text=32)))
    return path


def test_videos_are_those_that_the_vae_of_diffusers_decodes(with_vae: tuple[Any, Path]) -> None:
    vae, engine = with_vae
    with goc_deploy.load(engine) as pipe:
        result = pipe.generate(prompt_embeds=captions_of(pipe.spec), seed=1)
        assert (pipe.spec.vae_scale, pipe.spec.vae_frames) == (8, 4)
    assert result.images is not None
    assert result.images.shape == (2, 5, 32, 48, 3)
    with pytest.raises(UsageError, match="the result has videos, which are no Pillow images"):
        result.pil()
    expected = pixels_to_uint8(np.moveaxis(judged(vae, result.latents), 2, 1))
    assert np.abs(result.images.astype(int) - expected.astype(int)).max() <= 1


def test_a_video_that_is_not_finite_leaves_its_neighbour_alone(
    with_vae: tuple[Any, Path],
) -> None:
    noise = noise_of((2, 4, 6))
    with goc_deploy.load(with_vae[1]) as pipe:
        captions = captions_of(pipe.spec)
        good = pipe.generate(prompt_embeds=captions, latents=noise)
        noise[1] = 3e38
        with np.errstate(all="ignore"):
            found = pipe.generate(prompt_embeds=captions, latents=noise, on_nonfinite="mark")
    assert list(found.errors) == [1]
    assert "the latents of image 1 are not finite" in str(found.errors[1])
    assert good.images is not None
    assert found.images is not None
    np.testing.assert_array_equal(found.images[0], good.images[0])
    assert not found.images[1].any()


def test_videos_become_files(
    with_vae: tuple[Any, Path], captions: Path, command: Command, tmp_path: Path
) -> None:
    base = [with_vae[1], "--prompt-embeds", captions]
    done = command("goc-run", *base, "--output", tmp_path / "clip.webp", "--fps", "8")
    assert done.stdout.split() == [str(tmp_path / f"clip-000{i}.webp") for i in range(2)]
    with Image.open(tmp_path / "clip-0001.webp") as clip:
        assert (clip.n_frames, clip.size) == (5, (48, 32))
    command("goc-run", *base, "--labels", "0", "--output", tmp_path / "frames")
    (tmp_path / "empty").mkdir()
    done = command("goc-run", *base, "--labels", "0", cwd=tmp_path / "empty")
    assert [path.name for path in (tmp_path / "empty").glob("goc-*.webp")] == done.stdout.split()
    assert len(list((tmp_path / "frames").glob("*.png"))) == 5
    wrong = command("goc-run", *base, "--output", tmp_path / "clip.png", code=2)
    assert "the model draws videos; choose an --output that ends in .mp4 or .webp" in wrong.stderr
    assert not (tmp_path / "clip.png").exists()


def test_a_missing_encoder_of_videos_is_named_before_anything_is_drawn(
    with_vae: tuple[Any, Path], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    options = RunOptions(prompt_embeds=captions, output=tmp_path / "clip.mp4")
    shown: list[str] = []
    with pytest.raises(EnvironmentUnsupportedError, match=r"install 'goc_deploy\[video\]', or wri"):
        run(with_vae[1], options, lambda what, *_: shown.append(what))
    assert not any(what.startswith("steps") for what in shown)


def test_videos_in_shards_are_refused(
    with_vae: tuple[Any, Path], captions: Path, tmp_path: Path
) -> None:
    options = RunOptions(prompt_embeds=captions, output=tmp_path / "x.npz")
    with pytest.raises(UsageError, match="shards hold images, but the model draws videos"):
        run_sharded(with_vae[1], options, ShardOptions(tmp_path / "shards"))
    assert not (tmp_path / "x.npz").exists()


def test_engines_of_the_decoder_are_for_tiles(with_vae: tuple[Any, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(with_vae[1], tmp_path / "engine"))
    manifest = EngineDir.open(directory).manifest
    assert manifest.video_decoder is not None
    tiled = replace(manifest, video_decoder=replace(manifest.video_decoder, tile=4, overlap=1))
    (directory / MANIFEST_NAME).write_text(manifest_to_json(tiled))
    target = Target("tensorrt", "10.9", "linux-x86_64", ("8.9",))
    for path, largest in ((with_vae[1], (8, 12)), (directory, (4, 4))):
        (job,) = (
            job
            for job in wanted_engines(EngineDir.open(path), target, EngineOptions())
            if job.unit.name == "video_decoder"
        )
        assert [shapes["latents"][-1][-2:] for shapes in job.profiles] == [largest]


def test_a_vae_of_videos_is_refused_for_images(tmp_path: Path) -> None:
    judge_of(VAE, tmp_path / "vae")
    torch.save(random_state(IMAGES, 3), tmp_path / "dit.pt")
    with pytest.raises(ModelError, match="is a VAE of videos, but the model draws images"):
        goc_deploy.export(tmp_path / "dit.pt", tmp_path / "e", num_heads=3, vae=tmp_path / "vae")
