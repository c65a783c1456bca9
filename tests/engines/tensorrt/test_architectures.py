"""Every graph of models that draw captions, really built by TensorRT-RTX.

They have a text encoder and a VAE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import goc_deploy
from benchmarks.make_checkpoint import random_state as checkpoint_state
from goc_deploy.api import build_engines
from goc_deploy.exporters.architectures.flux import FluxConfig
from goc_deploy.exporters.architectures.flux import spec_of as flux_spec
from goc_deploy.exporters.architectures.flux2 import Flux2Config
from goc_deploy.exporters.architectures.flux2 import spec_of as flux2_spec
from goc_deploy.exporters.architectures.qwen import spec_of as qwen_spec
from goc_deploy.exporters.architectures.sd3_spec import spec_of as sd3_spec
from goc_deploy.exporters.architectures.wan_diffusers import shapes_from_spec, spec_of
from goc_deploy.exporters.architectures.z_image import ZImageConfig
from goc_deploy.exporters.architectures.z_image import spec_of as z_image_spec
from goc_deploy.exporters.companions.vae import VaeDecoder, vae_config
from goc_deploy.options import EngineOptions, no_progress
from tests.exporters.architectures.test_pixart_sigma import sigma_state
from tests.exporters.companions.test_qwen_vae import CONFIG as QWEN_VAE
from tests.exporters.companions.test_text_encoders import sd3_pipeline
from tests.exporters.companions.test_vae import CONFIG as VAE
from tests.exporters.companions.test_vae import WEIGHTS as VAE_WEIGHTS
from tests.exporters.companions.test_wan_vae import SMALL as WAN_VAE
from tests.exporters.companions.test_wan_vae import judge_of
from tests.exporters.test_operators import check_bfloat16
from tests.pixart_reference import random_state
from tests.t5_folder import save_encoder

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text encoder and a VAE, all random."""
    folder = tmp_path_factory.mktemp("parts")
    torch.save({"state_dict": random_state()}, folder / "alpha.pth")
    torch.save({"state_dict": sigma_state()}, folder / "sigma.pth")
    save_encoder(folder / "t5")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    save_file(VaeDecoder(vae_config(VAE, "")).state_dict(), folder / "vae" / VAE_WEIGHTS)
    return folder


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_every_graph_of_videos_of_any_size_builds(tmp_path: Path) -> None:
    judge_of(WAN_VAE, tmp_path / "vae")
    save_encoder(tmp_path / "umt5", d_model=12, model_type="umt5")
    spec = spec_of(2, 2, 24, ffn=64, channels=16, text=12)
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes_from_spec(spec).items()}
    save_file(state, tmp_path / "wan.safetensors")
    goc_deploy.export(
        tmp_path / "wan.safetensors", tmp_path / "engine", num_heads=2, precision="bf16", steps=4,
        plans=["none", "fora:2+gc:1.0"], max_batch=1, size=(16, 12), frames=3, max_size=(24, 24),
        max_frames=5, vae=tmp_path / "vae", text_encoder=tmp_path / "umt5",
    )  # fmt: skip
    assert check_bfloat16(tmp_path / "engine")
    options = EngineOptions(capabilities=("8.6", "8.9", "12.0"), weight_mode="shared")
    manifest, built = build_engines(tmp_path / "engine", options, no_progress)
    assert built == len(manifest.engines)
    served = {graph for engine in manifest.engines for graph in engine.graphs}
    assert {graph.onnx for graph in manifest.graphs} <= served


def check_builds(checkpoint: Path, **options_of_family: Any) -> None:
    """Export a checkpoint, and check that an engine is built of each of its graphs.

    ONNX Runtime's CUDA provider has a kernel for each of their operators, too.
    """
    directory = checkpoint.parent / "engine"
    goc_deploy.export(
        checkpoint, directory, precision="bf16", steps=4,
        plans=["none", "fora:2+gc:1.0"], max_batch=1, **options_of_family,
    )  # fmt: skip
    assert check_bfloat16(directory)
    options = EngineOptions(capabilities=("8.9", "12.0"), weight_mode="shared")
    manifest, built = build_engines(directory, options, no_progress)
    assert built == len(manifest.engines)
    served = {graph for engine in manifest.engines for graph in engine.graphs}
    assert {graph.onnx for graph in manifest.graphs} <= served


def test_every_graph_of_two_streams_builds(tmp_path: Path) -> None:
    """A Stable Diffusion 3 with a dual, a plain and a last block."""
    spec = sd3_spec(3, 2, 32, dual=(0,), qk_norm=True, table=6, grid=4, text=12, pooled=10)
    save_file(checkpoint_state(spec, 0), tmp_path / "sd3.safetensors")
    check_builds(tmp_path / "sd3.safetensors", size=(48, 32), max_size=(48, 48))


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_every_graph_of_clip_encoders_builds(tmp_path: Path) -> None:
    """A Stable Diffusion 3 with both CLIPs, a T5 and a VAE, from the folder of its pipeline."""
    folder = tmp_path / "pipeline"
    sd3_pipeline(tmp_path).save_pretrained(folder)
    check_builds(folder, text_encoder=folder, vae=folder, size=(8, 8))


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_every_graph_of_turned_text_builds(tmp_path: Path) -> None:
    """A Qwen-Image of a block with a text stream and a last one, and its VAE."""
    spec = qwen_spec(2, 2, (4, 14, 14), channels=4, text=12)
    save_file(checkpoint_state(spec, 0), tmp_path / "qwen.safetensors")
    numbers = {name: QWEN_VAE[name][:4] for name in ("latents_mean", "latents_std")}
    vae = diffusers.AutoencoderKLQwenImage(**{**QWEN_VAE, "z_dim": 4, **numbers})
    vae.save_pretrained(tmp_path / "vae")
    check_builds(
        tmp_path / "qwen.safetensors", size=(16, 24), max_size=(32, 32), vae=tmp_path / "vae"
    )


def test_every_graph_of_a_model_that_edits_images_builds(tmp_path: Path) -> None:
    """A Qwen-Image-Edit with up to two reference images."""
    spec = qwen_spec(2, 2, (4, 14, 14), channels=4, text=12)
    save_file(checkpoint_state(spec, 0), tmp_path / "edit.safetensors")
    sizes = {"size": (8, 12), "max_size": (16, 16), "max_references": 2}
    check_builds(tmp_path / "edit.safetensors", model="qwen-image-edit", **sizes)


def test_every_graph_of_single_blocks_builds(tmp_path: Path) -> None:
    """A FLUX.1 with a double block, a single one and the last one."""
    spec = flux_spec(
        FluxConfig(
            in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=1,
            joint_attention_dim=12, pooled_projection_dim=20, guidance_embeds=True,
        )
    )  # fmt: skip
    save_file(checkpoint_state(spec, 0), tmp_path / "flux.safetensors")
    check_builds(tmp_path / "flux.safetensors", size=(64, 96), max_size=(128, 128))


def test_every_graph_of_shared_modulation_builds(tmp_path: Path) -> None:
    """A FLUX.2 with a double block, a single one and the last one."""
    spec = flux2_spec(
        Flux2Config(
            in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=1,
            joint_attention_dim=12,
        )
    )  # fmt: skip
    save_file(checkpoint_state(spec, 0), tmp_path / "flux2.safetensors")
    check_builds(tmp_path / "flux2.safetensors", size=(64, 96), max_size=(128, 128))


def test_every_graph_of_one_stream_of_both_builds(tmp_path: Path) -> None:
    """A Z-Image with a block of the image alone, one of both streams, and a last one."""
    config = ZImageConfig(
        in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=12, axes_dims=(32, 48, 48),
    )  # fmt: skip
    save_file(checkpoint_state(z_image_spec(config, ""), 0), tmp_path / "z.safetensors")
    check_builds(tmp_path / "z.safetensors", size=(16, 8), max_size=(16, 16))


@pytest.mark.parametrize(
    ("model", "precision", "weights"),
    [("alpha", "fp16", "embedded"), ("sigma", "bf16", "shared")],
)
def test_every_graph_builds(
    parts: Path, tmp_path: Path, model: str, precision: str, weights: str
) -> None:
    companions = {"text_encoder": parts / "t5", "vae": parts / "vae"} if precision == "fp16" else {}
    more = {"num_heads": 3, "steps": 6, "max_batch": 2, "precision": precision, **companions}
    goc_deploy.export(
        parts / f"{model}.pth", tmp_path / "engine", plans=["none", "fora:2+gc:1.0"], **more
    )
    options = EngineOptions(capabilities=("8.6", "8.9", "12.0"), weight_mode=weights)
    manifest, built = build_engines(tmp_path / "engine", options, no_progress)
    served = {graph: engine for engine in manifest.engines for graph in engine.graphs}
    assert built == len(manifest.engines)
    units = manifest.model.units
    assert set(manifest.segments) == {f"-*{units}", f"w*{units}"}
    for unit in (*manifest.graphs, *map(manifest.segment_graph, manifest.segments)):
        assert served[unit.onnx].kernels
