"""Decoders of videos: the same frames as diffusers, one by one, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from goc_deploy.cancellation import CallLimits
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import DeadlineError, ModelError, UsageError
from goc_deploy.exporters.companions.wan_vae import (
    PRECISION,
    WanVae,
    read_wan_vae_folder,
    video_decoder_kind,
    video_decoder_spec,
)
from goc_deploy.exporters.companions.wan_vae_model import WanVaeDecoder
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.protocols import Engine
from goc_deploy.runtime.decoder import ramp
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.runtime.video_decoder import VideoDecoder
from goc_deploy.spec import FrameCache, ModelSpec
from tests.distances import relative_l2

CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.42.1",
    "attn_scales": [],
    "base_dim": 3,
    "dim_mult": [1, 1, 1, 1],
    "dropout": 0.0,
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
OF_5B: dict[str, Any] = {  # odd widths, patches, and shortcuts around the levels
    **CONFIG,
    "base_dim": 4,
    "decoder_base_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "in_channels": 12,
    "is_residual": True,
    "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0],
    "latents_std": [1.5, 0.5, 1.0, 2.0, 0.7],
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "z_dim": 5,
}
SMALL: dict[str, Any] = {  # whose graph is traced quickly
    **CONFIG,
    "base_dim": 4,
    "dim_mult": [1, 2],
    "temperal_downsample": [True],
    "num_res_blocks": 1,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def spec_of(channels: int) -> ModelSpec:
    return ModelSpec(1, 48, 3, 96, 2, 4, channels, 10, False)


def judge_of(config: dict[str, Any], folder: Path) -> Any:
    """A random VAE of diffusers, saved to a folder."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = {name: v for name, v in config.items() if not name.startswith("_")}
        judge = diffusers.AutoencoderKLWan(**settings).eval()
        for parameter in judge.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    judge.save_pretrained(folder)
    return judge


def judged(judge: Any, latents: np.ndarray) -> np.ndarray:
    """What Wan's pipeline makes of latents: (N, channels, frames, H, W)."""
    of_channels = (
        torch.tensor(values).reshape(1, -1, 1, 1, 1)
        for values in (judge.config.latents_std, judge.config.latents_mean)
    )
    std, mean = of_channels
    with torch.inference_mode():
        frames: np.ndarray = judge.decode(torch.from_numpy(latents) * std + mean).sample.numpy()
    return frames


def latents_of(channels: int, *sizes: int) -> np.ndarray:
    count, *rest = sizes
    generator = np.random.default_rng(1)
    return generator.standard_normal((count, channels, *rest)).astype(np.float32)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("config", [CONFIG, OF_5B], ids=["2.1", "2.2-5B"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (2, 5, 3), (5, 2, 4)])
def test_every_frame_is_that_of_diffusers(
    config: dict[str, Any], frames: int, height: int, width: int, tmp_path: Path
) -> None:
    judge, channels = judge_of(config, tmp_path), config["z_dim"]
    vae = read_wan_vae_folder(tmp_path, spec_of(channels))
    module, sizes = WanVaeDecoder(vae.config).eval(), video_decoder_spec(vae.config)
    module.load_state_dict(vae.checkpoint.tensors)
    assert (sizes.frames, sizes.channels) == (4, 3)
    assert sizes.upscale == config.get("scale_factor_spatial", 8)
    latents = latents_of(channels, 1, frames, height, width)
    expected, start = judged(judge, latents), 0
    caches = [torch.zeros(sizes.cache_shape(cache, height, width)) for cache in sizes.caches]
    for frame in range(frames):
        of_frame = torch.from_numpy(latents[:, :, frame : frame + 1])
        with torch.inference_mode():
            pixels, *caches = module(of_frame, torch.tensor([float(frame == 0)]), *caches)
        made = pixels[:, :, -1:] if frame == 0 else pixels
        assert [tuple(c.shape) for c in caches] == [
            sizes.cache_shape(cache, height, width) for cache in sizes.caches
        ]
        for i, found in enumerate(made.unbind(2)):
            assert relative_l2(found.numpy(), expected[:, :, start + i]) < 1e-4
        start += made.shape[2]
    assert start == expected.shape[2] == 1 + 4 * (frames - 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, WanVae, GraphEntry, Engine]:
    """A VAE of diffusers, what was read of it, and its graph on ONNX Runtime."""
    folder = tmp_path_factory.mktemp("wan")
    judge = judge_of(SMALL, folder / "vae")
    vae = read_wan_vae_folder(folder / "vae", spec_of(16))
    writer = UnitWriter(folder, OrtBackend(), lambda *_: None)
    (unit,) = writer.write(
        (video_decoder_kind(vae.config, spec_of(16)),), vae.checkpoint.tensors, PRECISION, "graph"
    )
    check_graph((folder / unit.onnx).read_bytes(), external_tensors({"": unit}), unit.onnx)
    return judge, vae, unit, writer.loaded(unit)


@pytest.fixture
def decoder(small: tuple[Any, WanVae, GraphEntry, Engine]) -> VideoDecoder:
    return VideoDecoder(small[3], OrtBackend(), video_decoder_spec(small[1].config), (5, 7))


@pytest.mark.filterwarnings("ignore")
def test_the_graph_decodes_videos_of_any_length_and_size(
    small: tuple[Any, WanVae, GraphEntry, Engine], decoder: VideoDecoder
) -> None:
    before = decoder.nbytes
    for sizes in ((1, 1, 5, 7), (2, 2, 4, 6), (1, 5, 3, 8), (1, 3, 5, 7)):
        latents = latents_of(16, *sizes)
        expected = judged(small[0], latents)
        for video, of_video in zip(expected, latents, strict=True):
            found = np.concatenate(list(decoder.pixels(of_video)))
            for frame, frame_expected in zip(found, np.moveaxis(video, 1, 0), strict=True):
                assert relative_l2(frame, frame_expected) < 1e-4
        videos = decoder.images(latents)
        count, frames, height, width = sizes
        assert videos.shape == (count, decoder.frames_of(frames), 2 * height, 2 * width, 3)
        whole = np.clip(127.5 * np.moveaxis(expected, 1, -1) + 128, 0, 255).astype(np.uint8)
        assert np.abs(videos.astype(int) - whole).max() <= 1
    assert decoder.nbytes == before


def test_memory_does_not_grow_with_the_video(
    small: tuple[Any, WanVae, GraphEntry, Engine],
) -> None:
    size, frames = (40, 56), 48
    decoder = VideoDecoder(small[3], OrtBackend(), video_decoder_spec(small[1].config), size)
    latents = latents_of(16, 1, frames, *size)
    for _ in decoder.pixels(latents[0, :, :4]):
        pass
    before, most, pixels_bytes = _anonymous_bytes(), 0, 0
    for pixels in decoder.pixels(latents[0]):
        most = max(most, _anonymous_bytes() - before)
        pixels_bytes += pixels.nbytes
    assert most < pixels_bytes / 4
    before = _anonymous_bytes()
    video = decoder.images(latents)
    assert _anonymous_bytes() - before < video.nbytes + pixels_bytes / 4


def _anonymous_bytes() -> int:
    """Memory of this process without mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_large_frames_are_decoded_in_tiles_that_are_blended(
    small: tuple[Any, WanVae, GraphEntry, Engine],
) -> None:
    """Every pixel is a mean of the tiles that contain it, each decoded by itself."""
    whole = video_decoder_spec(small[1].config)
    sizes = video_decoder_spec(small[1].config, 4)
    assert (sizes.tile, sizes.overlap) == (4, 1)
    tiled, memory = (
        VideoDecoder(small[3], OrtBackend(), sizes, largest) for largest in ((7, 10), (90, 160))
    )
    assert tiled.nbytes == memory.nbytes
    latents = latents_of(16, 2, 3, 7, 10)
    found, frames = tiled.images(latents), tiled.frames_of(3)
    expected = np.zeros((2, frames, 3, 14, 20))
    weights = np.zeros((14, 20))
    for y, x in product((0, 3), (0, 3, 6)):
        share = np.outer(
            *(ramp(8, 2, first=s == 0, last=s == last) for s, last in ((y, 3), (x, 6)))
        )
        place = np.s_[2 * y : 2 * y + 8, 2 * x : 2 * x + 8]
        weights[place] += share
        for video, of_video in zip(expected, latents, strict=True):
            pixels = np.concatenate(list(tiled.pixels(of_video[:, :, y : y + 4, x : x + 4])))
            video[:, :, *place] += share * pixels
    for video, of_video in zip(expected / weights, found, strict=True):
        as_bytes = np.stack([pixels_to_uint8(pixels) for pixels in video])
        assert np.abs(of_video.astype(int) - as_bytes).max() <= 1
    small_frames = latents_of(16, 1, 2, 4, 3)
    in_one_piece = VideoDecoder(small[3], OrtBackend(), whole, (7, 10))
    np.testing.assert_array_equal(tiled.images(small_frames), in_one_piece.images(small_frames))
    assert tiled.nbytes < in_one_piece.nbytes
    wide = latents_of(16, 1, 2, 2, 30)  # lower than a tile
    assert tiled.images(wide).shape == (1, tiled.frames_of(2), 4, 60, 3)


def test_the_graph_is_compared_with_pytorch(
    small: tuple[Any, WanVae, GraphEntry, Engine],
) -> None:
    _, vae, unit, engine = small
    assert unit.relative_l2 is not None
    assert unit.relative_l2 < 1e-5
    caches = video_decoder_spec(vae.config).caches
    assert caches[0] == FrameCache(16, 1)
    assert caches[-1] == FrameCache(4, 2)
    kept = {name for name in engine.dtypes if name.startswith("kept_")}
    assert kept == {f"kept_{i}" for i in range(len(caches))}


def test_latents_that_do_not_fit_are_refused(decoder: VideoDecoder) -> None:
    with pytest.raises(UsageError, match=r"\(1, 4, 2, 5, 7\) are not \(N, 16, F, H, W\)"):
        decoder.images(latents_of(4, 1, 2, 5, 7))
    with pytest.raises(UsageError, match=r"\(1, 16, 0, 5, 7\) are not"):
        decoder.images(latents_of(16, 1, 0, 5, 7))
    with pytest.raises(UsageError, match="6 x 6 pixels are larger than the 35 pixels that the"):
        decoder.images(latents_of(16, 1, 2, 6, 6))


def test_a_deadline_ends_a_video_between_frames(decoder: VideoDecoder) -> None:
    with pytest.raises(DeadlineError):
        decoder.images(latents_of(16, 1, 2, 5, 7), CallLimits(seconds=0.0, ends_at=0.0))


@pytest.fixture
def folder(small: tuple[Any, WanVae, GraphEntry, Engine], tmp_path: Path) -> Path:
    """The folder of the small VAE, to be damaged."""
    small[0].save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


Damage = Callable[[dict[str, Any]], object]
REFUSED: dict[str, tuple[Damage, str]] = {
    "class": (lambda c: c.update(_class_name="AutoencoderKL"), "_class_name is 'AutoencoderKL', o"),
    "channels": (lambda c: c.update(z_dim=4, latents_mean=[0] * 4), "latents_std has 16 values, e"),
    "attention": (lambda c: c.update(attn_scales=[1.0]), r"attn_scales is \[1.0\], only \[\] is"),
    "doublings": (lambda c: c.update(dim_mult=[1, 2, 4]), "temperal_downsample has 1 entries, exp"),
    "unknown": (lambda c: c.update(extra=1), "has a setting 'extra' that this version does not"),
    "patch": (lambda c: c.update(patch_size=2), "out_channels is 3 with patch_size 2, expected 3"),
    "width": (lambda c: c.update(base_dim=0), "base_dim: expected int >= 1, got 0"),
    "weights": (lambda c: c.update(num_res_blocks=2), "tensors do not match the VAE decoder that"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", REFUSED)
def test_folders_that_do_not_fit_are_refused(folder: Path, change: str) -> None:
    damage, message = REFUSED[change]
    config = json.loads((folder / "config.json").read_text())
    damage(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        read_wan_vae_folder(folder, spec_of(16))


@pytest.mark.filterwarnings("ignore")
def test_a_vae_of_another_model_or_with_missing_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="decodes 16 channels but the model makes 4"):
        read_wan_vae_folder(folder, replace(spec_of(16), channels=4))
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"1 missing: decoder\.conv_out\.bias"):
        read_wan_vae_folder(folder, spec_of(16))
