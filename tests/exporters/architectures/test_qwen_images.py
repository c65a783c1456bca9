"""Qwen-Image: the images of diffusers at several sizes, with and without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import goc_deploy
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.sums import check_that_sums_take_the_place_of_features
from tests.exporters.architectures.test_qwen import packed, unpacked
from tests.exporters.companions.test_qwen_vae import CONFIG as VAE
from tests.pixart_reference import Cache
from tests.qwen_folder import random_qwen
from tests.reference import table_step

PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2", "fora:10")
STEPS, SCALE = 10, 4.0
SIZES = {(80, 48): (3, 5), (48, 64): (4, 3)}  # width and height in pixels: rows and columns
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {  # of the public models
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift": 1.0,
    "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def judge() -> Any:
    return random_qwen()


def random_vae() -> Any:
    """diffusers' VAE of a Qwen-Image, small."""
    torch.manual_seed(3)
    settings = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    config = {**VAE, **settings, "z_dim": 16, "latents_mean": [0.1] * 16, "latents_std": [1.5] * 16}
    return diffusers.AutoencoderKLQwenImage(**config).eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    return random_vae()


@pytest.fixture(scope="module")
def pipeline(judge: Any, vae: Any) -> Any:
    """The pipeline of diffusers, without a text encoder."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    made = diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=judge
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pipeline."""
    folder = tmp_path_factory.mktemp("qwen") / "pipeline"
    for name in ("scheduler", "vae", "transformer"):
        getattr(pipeline, name).save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Path:
    manifest = goc_deploy.export(
        folder, folder.parent / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=(80, 48), max_size=(96, 64), sampler="euler",
    )  # fmt: skip
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder.parent / "engine"


def arrays() -> dict[str, np.ndarray]:
    """Two captions of 13 and 9 tokens, and a short negative one."""
    draw = np.random.default_rng(1).standard_normal
    mask = np.ones((2, 13), np.int64)
    mask[1, 9:] = 0
    return {
        "prompt_embeds": draw((2, 13, 40)).astype(np.float32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": draw((1, 5, 40)).astype(np.float32),
    }


def captions_of(spec: ModelSpec) -> PromptEmbeds:
    return prompt_embeds_from_arrays(arrays(), spec, "")


def noise_of(grid: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((2, 16, 2 * grid[0], 2 * grid[1]))
    return noise.astype(np.float32)


@contextmanager
def cached_units(judge: Any, feature: Callable[..., Tensor]) -> Iterator[None]:
    """Let every branch take its features from ``feature(stream, unit, compute)``.

    The features of an attention are side by side, text first, and belong to the image's stream.
    """
    originals: list[tuple[Any, Any]] = []

    def hook(layer: Any, stream: str, unit: int) -> None:
        own = layer.forward
        originals.append((layer, own))

        def of_attn(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
            length = more["encoder_hidden_states"].shape[1]
            both = feature(stream, unit, lambda: torch.cat(own(*args, **more)[::-1], dim=1))
            return both[:, length:], both[:, :length]

        def of_mlp(*args: Any, **more: Any) -> Tensor:
            return feature(stream, unit, lambda: own(*args, **more))

        layer.forward = of_mlp if unit % 2 else of_attn

    for i, block in enumerate(judge.transformer_blocks):
        hook(block.attn, "image", 2 * i)
        hook(block.img_mlp, "image", 2 * i + 1)
        hook(block.txt_mlp, "text", 2 * i + 1)
    try:
        yield
    finally:
        for layer, forward in originals:
            layer.forward = forward


def guided(cond: Tensor, uncond: Tensor, grid: tuple[int, int]) -> Tensor:
    """The guidance of the pipeline, for latents (N, C, H, W)."""
    combined = uncond + SCALE * (cond - uncond)
    sizes = [torch.norm(packed(part), dim=-1, keepdim=True) for part in (cond, combined)]
    return unpacked(packed(combined) * (sizes[0] / sizes[1]), grid)


def eager_latents(
    judge: Any, schedule: Schedule, table: SamplerTable, noise: np.ndarray
) -> np.ndarray:
    """The final latents of diffusers' model, whose features a schedule replaces."""
    given, grid = arrays(), (noise.shape[2] // 2, noise.shape[3] // 2)
    short = np.pad(given["negative_prompt_embeds"], ((0, 0), (0, 8), (0, 0)))
    embeds = torch.from_numpy(np.concatenate([given["prompt_embeds"], short, short]))
    mask = torch.ones(4, 13, dtype=torch.bool)
    mask[1, 9:], mask[2:, 5:] = False, False
    caches = {stream: Cache(schedule) for stream in ("image", "text")}
    x, step_of = torch.from_numpy(noise), table_step(table)
    with (
        torch.inference_mode(),
        cached_units(judge, lambda stream, unit, compute: caches[stream](unit, compute)),
    ):
        for step, t in enumerate(table.timesteps):
            for cache in caches.values():
                cache.step = step
            tokens, shapes = packed(torch.cat([x, x])), [[(1, *grid)]] * 4
            times = torch.full((4,), float(t) / 1000)
            output = unpacked(judge(tokens, embeds, mask, times, img_shapes=shapes).sample, grid)
            m = guided(*output.chunk(2), grid)
            x = step_of(step, x, m, output, torch.zeros_like(x))
    return x.numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_latents_are_those_of_diffusers_with_hooked_blocks(
    judge: Any, engine: Path, plan: str, size: tuple[int, int]
) -> None:
    noise = noise_of(SIZES[size])
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec), latents=noise, size=size, cfg_scale=SCALE
        ).latents
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    expected = eager_latents(judge, schedule, table, noise)
    assert relative_l2(found, expected) < 1e-4


def test_the_loop_of_the_pipeline_is_followed(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    """The latents of the pipeline, with its scheduler, at the usual size and at another one."""
    goc_deploy.export(
        folder, tmp_path / "e", plans=["none"], steps=STEPS, max_batch=2, size=(80, 48), vae=folder
    )
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    with goc_deploy.load(tmp_path / "e") as pipe:
        for size, grid in SIZES.items():
            noise = noise_of(grid)
            found = pipe.generate(
                prompt_embeds=captions_of(pipe.spec), latents=noise, size=size, cfg_scale=SCALE
            )
            theirs = pipeline(
                prompt_embeds=given["prompt_embeds"],
                prompt_embeds_mask=given["prompt_attention_mask"],
                negative_prompt_embeds=given["negative_prompt_embeds"].expand(2, -1, -1),
                negative_prompt_embeds_mask=torch.ones(2, 5, dtype=torch.int64),
                width=size[0],
                height=size[1],
                num_inference_steps=STEPS,
                true_cfg_scale=SCALE,
                latents=packed(torch.from_numpy(noise)),
                output_type="latent",
            ).images
            expected = unpacked(theirs, grid).numpy()
            assert relative_l2(found.latents, expected) < 1e-3
            assert found.images is not None
            assert found.images.shape == (2, size[1], size[0], 3)


def test_an_image_does_not_depend_on_the_captions_beside_it(engine: Path) -> None:
    """Captions of other lengths share a batch, and padding is not seen."""
    noise = noise_of((3, 5))
    with goc_deploy.load(engine, plan="fora:2+gc:1.0") as pipe:
        together = pipe.generate(prompt_embeds=captions_of(pipe.spec), latents=noise).latents
        short = arrays()
        short = {**short, "prompt_embeds": short["prompt_embeds"][1:, :9]}
        del short["prompt_attention_mask"]
        alone = pipe.generate(
            prompt_embeds=prompt_embeds_from_arrays(short, pipe.spec, ""), latents=noise[1:]
        ).latents
    assert relative_l2(alone, together[1:]) < 1e-5


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_sums_take_the_place_of_features(engine: Path, plan: str) -> None:
    check_that_sums_take_the_place_of_features(
        engine, plan, lambda spec: {"prompt_embeds": captions_of(spec)}
    )


def test_a_file_holds_the_same_model(folder: Path, tmp_path: Path) -> None:
    save_file(load_file(folder / "transformer" / WEIGHTS), tmp_path / "qwen.safetensors")
    options = {"size": (80, 48), "sampler": "euler", "plans": ["none"], "steps": 4}
    from_file = goc_deploy.export(tmp_path / "qwen.safetensors", tmp_path / "a", **options)
    from_folder = goc_deploy.export(folder / "transformer", tmp_path / "b", **options)
    assert from_file.model == from_folder.model
    assert from_file.model.architecture == "qwen-image"
    results = []
    for name in ("a", "b"):
        with goc_deploy.load(tmp_path / name) as pipe:
            results.append(pipe.generate(prompt_embeds=captions_of(pipe.spec), seed=4).latents)
    np.testing.assert_array_equal(*results)


def test_a_collapsed_step_reads_no_text(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:10", max_sessions=1) as pipe:
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=captions_of(pipe.spec))
