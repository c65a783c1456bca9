"""Decoders of latents: the same pixels as diffusers, tiles without seams, and refusals by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError, GocError, ModelError, SafetyError
from goc_deploy.exporters.companions.vae import VaeDecoder, decoder_spec, read_vae_folder
from goc_deploy.protocols import Buffer, Engine, Run, Stream
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.loading import load_engines
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.reference import relative_l2
from tests.stand_ins.counted import CountingOrt

SPEC = ModelSpec(1, 48, 3, 96, 2, 4, 4, 10, False)
CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.31,
    "shift_factor": 0.2,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of the layout that diffusers saves, with an encoder that nobody needs."""
    from goc_deploy.exporters.companions.vae import vae_config

    folder = tmp_path_factory.mktemp("vae")
    write_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = VaeDecoder(vae_config(CONFIG, "")).state_dict()
        state = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in state.items()}
    save_file(
        {
            **state,
            "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
            "quant_conv.bias": torch.zeros(8),
        },
        folder / WEIGHTS,
    )
    return folder


@pytest.fixture
def copy(vae: Path, tmp_path: Path) -> Path:
    """The folder, to be damaged."""
    folder = tmp_path / "vae"
    folder.mkdir()
    for name in ("config.json", WEIGHTS):
        (folder / name).write_bytes((vae / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latent") / "model.pt"
    torch.save(random_state(SPEC, 1), path)
    return path


def export(model: Path, output: Path, vae: Path, **options: Any) -> Any:
    return goc_deploy.export(
        model, output, num_heads=3, plans=["none"], steps=2, max_batch=2, vae=vae, **options
    )


@pytest.fixture(scope="module")
def tiled(model: Path, vae: Path) -> Path:
    """An engine that decodes 8x8 latents in tiles of 6x6."""
    manifest = export(model, model.parent / "tiled", vae, vae_tile=6)
    assert manifest.decoder is not None
    assert (manifest.decoder.tile, manifest.decoder.overlap, manifest.image_size) == (
        6,
        1,
        (16, 16),
    )
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4
    return model.parent / "tiled"


def whole_decoder(folder: Path, spec: ModelSpec = SPEC) -> VaeDecoder:
    found = read_vae_folder(folder, spec)
    module = VaeDecoder(found.config).eval()
    module.load_state_dict(found.checkpoint.tensors)
    return module


SIXTEEN = {  # as the VAE of Stable Diffusion 3 and FLUX.1
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("changes", [{}, SIXTEEN], ids=["4 channels", "16 channels"])
def test_pixels_are_those_of_diffusers(tmp_path: Path, changes: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    torch.manual_seed(2)
    settings = {k: v for k, v in CONFIG.items() if not k.startswith("_")} | changes
    judge = diffusers.AutoencoderKL(**settings).eval()
    for parameter in judge.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    judge.save_pretrained(tmp_path / "vae")
    latents = torch.randn(3, judge.config.latent_channels, 8, 8)
    with torch.inference_mode():
        expected = judge.decode(
            latents / judge.config.scaling_factor + judge.config.shift_factor
        ).sample.numpy()
        spec = replace(SPEC, channels=judge.config.latent_channels)
        found = whole_decoder(tmp_path / "vae", spec)(latents).numpy()
    assert relative_l2(found, expected) < 1e-5


class OneByOne:
    """A loaded graph that runs once for each sample of its batch."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.dtypes = engine, engine.dtypes

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        def of_sample(tensors: Mapping[str, Buffer], i: int) -> dict[str, Buffer]:
            return {
                name: b.view(1, *b.shape[1:], start=i * math.prod(b.shape[1:]))
                for name, b in tensors.items()
            }

        runs = [
            self._engine.bind(of_sample(inputs, i), of_sample(outputs, i), stream)
            for i in range(next(iter(inputs.values())).shape[0])
        ]

        def run_each() -> None:
            for run in runs:
                run()

        return run_each


def latent_decoder(
    directory: Path,
    *,
    backend: OrtBackend | None = None,
    wrap: Callable[[Engine], Engine] = lambda engine: engine,
    **changes: int,
) -> LatentDecoder:
    """The decoder of an engine directory, for latents of another size if ``changes`` tell."""
    opened, backend = EngineDir.open(directory), backend or OrtBackend()
    manifest, units = opened.manifest, load_engines(opened, [], backend, ["decoder"]).units
    assert manifest.decoder is not None
    spec = replace(manifest.model, **changes)
    return LatentDecoder(wrap(units["decoder"]), backend, manifest.decoder, spec)


def test_tiles_are_close_to_the_whole(tiled: Path, vae: Path) -> None:
    """Group norms, attention and padding see a tile only.

    The effect is largest in tiles as small as these.
    """
    with goc_deploy.load(tiled) as pipe:
        result, spec = pipe.generate([1], seed=1), pipe.spec
    smooth = np.cumsum(result.latents[0], axis=2) / 8
    (found,) = latent_decoder(tiled).pixels(smooth[None])
    one_tile = latent_decoder(tiled, grid=6 // spec.patch)
    (corner,) = one_tile.pixels(smooth[None, :, :6, :6])
    with torch.inference_mode():
        whole = whole_decoder(vae)(torch.from_numpy(smooth)[None])[0].numpy()
    assert relative_l2(found, whole) < 0.3
    np.testing.assert_allclose(
        found[:, :4, :4], corner[:, :4, :4], atol=1e-6
    )  # where no other tile reaches
    assert result.images is not None
    assert result.images.shape == (1, 16, 16, 3)


def test_videos_and_rectangles_are_decoded_frame_by_frame(tiled: Path) -> None:
    decoder = latent_decoder(tiled)
    videos = np.random.default_rng(0).standard_normal((2, 4, 3, 8, 12)).astype(np.float32)
    found = decoder.images(videos)
    assert found.shape == (2, 3, 16, 24, 3)
    for i, j in np.ndindex(2, 3):
        (frame,) = decoder.images(videos[i : i + 1, :, j])
        np.testing.assert_array_equal(found[i, j], frame)


def test_tiles_of_several_images_share_a_launch_and_give_the_same_pixels(tiled: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    backend = CountingOrt("latents")
    together = list(latent_decoder(tiled, backend=backend).pixels(latents))
    assert backend.runs == [8, 4]  # 3 images of 4 tiles, 8 tiles at most
    alone = list(latent_decoder(tiled, wrap=OneByOne).pixels(latents))
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_old_names_of_the_attention_are_read(copy: Path) -> None:
    new = read_vae_folder(copy, SPEC).checkpoint.tensors
    state = load_file(copy / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, before in names.items():
        for kind in ("weight", "bias"):
            tensor = state.pop(f"decoder.mid_block.attentions.0.{now}.{kind}")
            tensor = tensor[..., None, None] if kind == "weight" else tensor
            state[f"decoder.mid_block.attentions.0.{before}.{kind}"] = tensor
    save_file(state, copy / WEIGHTS)
    old = read_vae_folder(copy, SPEC).checkpoint.tensors
    assert new.keys() == old.keys()
    assert all(torch.equal(old[name], tensor) for name, tensor in new.items())


def test_a_pipeline_folder_holds_a_vae(copy: Path) -> None:
    (copy.parent / "model_index.json").write_text("{}")
    assert read_vae_folder(copy.parent, SPEC).config.scaling == 0.31


def test_the_smallest_tile_is_the_whole() -> None:
    config = read_config({})
    assert decoder_spec(config, SPEC, 64).tile == SPEC.side
    assert decoder_spec(config, SPEC, 4).tile == 4


def read_config(changes: dict[str, Any]) -> Any:
    from goc_deploy.exporters.companions.vae import vae_config

    return vae_config({**CONFIG, **changes}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latent_channels": 16},
            "decodes 16 channels but the model makes 4; give the VAE that it was trained with",
        ),
        (
            {"_class_name": "AutoencoderTiny"},
            "_class_name is 'AutoencoderTiny', only 'AutoencoderKL' is supported",
        ),
        ({"latents_mean": [0.1]}, "latents_mean is .0.1., only None"),
        ({"flow": 1}, "setting 'flow' that this version does not know"),
        ({"scaling_factor": 0}, r"\$\.scaling_factor: expected float > 0.0, got 0"),
        ({"shift_factor": "a"}, r"\$\.shift_factor: expected float \| null, got 'a'"),
        ({"block_out_channels": [6, 16]}, "must be multiples of norm_num_groups"),
        ({"block_out_channels": 8}, r"\$\.block_out_channels: expected array, got 8"),
        ({"up_block_types": ["UpBlock2D"]}, "only UpDecoderBlock2D once per level"),
        ({"out_channels": 4}, "out_channels is 4, images have 1 or 3"),
        (
            {"block_out_channels": [64] * 9},
            r"\$\.block_out_channels: expected array of length <= 8",
        ),
        ({"block_out_channels": [0]}, r"\$\.block_out_channels\[0\]: expected int >= 1, got 0"),
        ({"use_post_quant_conv": None}, r"\$\.use_post_quant_conv: expected bool, got None"),
        ({"layers_per_block": 2}, "2 missing|missing: decoder.up_blocks.0.resnets.2"),
        ({"mid_block_add_attention": False}, "unexpected: decoder.mid_block.attentions.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(copy, **changes)
    with pytest.raises(ModelError, match=message):
        read_vae_folder(copy, SPEC)


def _lie(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], type[GocError], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        ModelError,
        "has no config.json; give the folder that",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        ModelError,
        "has neither diffusion_pytorch_model.safetensors",
    ),
    "header lies": (_lie, ModelError, "not a sound safetensors file"),
    "code": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            torch.save({"a": print}, f / "diffusion_pytorch_model.bin"),
        ),
        SafetyError,
        "asks to run code",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(copy: Path, damage: str) -> None:
    change, error, message = DAMAGE[damage]
    change(copy)
    with pytest.raises(error, match=message):
        read_vae_folder(copy, SPEC)


def test_the_command_line_draws_latents(
    model: Path, copy: Path, tmp_path: Path, command: Command
) -> None:
    engine = tmp_path / "engine"
    more = ("--num-heads", 3, "--plan", "none", "--plan", "fora:2", "--steps", 3, "--vae-tile", 6)
    command("goc-export", model, "-o", engine, "--vae", copy, *more)
    assert json.loads((engine / "manifest.json").read_text())["decoder"]["tile"] == 6
    command(
        "goc-run",
        engine,
        "--labels",
        "1,2",
        "--output",
        tmp_path / "x.npz",
        "--report",
        tmp_path / "report.json",
    )
    with np.load(tmp_path / "x.npz") as images:
        assert images["arr_0"].shape == (2, 16, 16, 3)
    assert json.loads((tmp_path / "report.json").read_text())["decode_ms"] > 0
    command("goc-run", engine, "--labels", "1,2", "--output", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "RGB"
    done = command(
        "goc-eval",
        engine,
        "--num-images",
        2,
        "--json",
        tmp_path / "eval.json",
        "--samples-output",
        tmp_path / "s",
    )
    assert done.returncode == 0
    with np.load(tmp_path / "s" / "fora-2.npz") as images:
        assert images["arr_0"].shape == (2, 16, 16, 3)
    again = command("goc-export", model, "-o", engine, "--vae", copy, *more)
    assert "up to date" in again.stderr
    write_config(copy, scaling_factor=0.5)
    assert (
        "use --force"
        in command("goc-export", model, "-o", engine, "--vae", copy, *more, code=8).stderr
    )
    write_config(copy, latent_channels=8)
    done = command("goc-export", model, "-o", tmp_path / "other", "--vae", copy, *more, code=3)
    assert "decodes 8 channels but the model makes 4" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_manifest_with_an_impossible_decoder_is_refused(tiled: Path, tmp_path: Path) -> None:
    found = json.loads((tiled / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(
        json.dumps({**found, "decoder": {**found["decoder"], "tile": 10**3}})
    )
    with pytest.raises(EngineDirError, match=r"\$\.decoder\.tile: expected int <="):
        goc_deploy.load(tmp_path)
