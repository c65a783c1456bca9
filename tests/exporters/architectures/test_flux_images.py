"""FLUX.1: the images of the pipeline of diffusers, with and without a cache, at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import goc_deploy
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.sums import check_that_sums_take_the_place_of_features
from tests.exporters.architectures.test_flux import folder_of, judge_of, packed
from tests.pixart_reference import Cache
from tests.reference import relative_l2, table_step

PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2", "fora:10")
STEPS = 10
# Width and height in pixels, and the shape of the latents; the first one is the usual size.
SIZES = {(96, 64): (8, 12), (48, 80): (10, 6)}
GUIDANCE = 2.5
TEXT = 512
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def judge() -> Any:
    return judge_of()


@pytest.fixture(scope="module")
def pipeline(judge: Any) -> Any:
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=judge,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def engine(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of(pipeline.transformer, tmp_path_factory.mktemp("flux") / "pipeline")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    manifest = goc_deploy.export(
        folder, folder.parent / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=(96, 64), max_size=(96, 96),
    )  # fmt: skip
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder.parent / "engine"


def arrays() -> dict[str, np.ndarray]:
    """Two captions with their pooled embeddings."""
    draw = np.random.default_rng(1).standard_normal
    return {
        "prompt_embeds": draw((2, TEXT, 20)).astype(np.float32),
        "pooled_prompt_embeds": draw((2, 28)).astype(np.float32),
    }


def captions_of(spec: ModelSpec) -> PromptEmbeds:
    return prompt_embeds_from_arrays(arrays(), spec, "")


def noise_of(shape: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((2, 3, *shape))
    return noise.astype(np.float32)


@contextmanager
def cached_units(
    judge: Any,
    feature: Callable[[str, int, Callable[[], Tensor]], Tensor],
    text: int = TEXT,
    single: str = "proj_out",
) -> Any:
    """Let every branch take its features from ``feature(part, unit, compute)``.

    The features of an attention and of a single block are side by side.

    Args:
        judge: the transformer.
        feature: returns the features to use.
        text: tokens of a caption.
        single: the layer of a single block that returns its features.
    """
    originals: list[tuple[Any, Any]] = []

    def hook(layer: Any, part: str, unit: int, *, attention: bool = False) -> None:
        own = layer.forward
        originals.append((layer, own))

        def of_attn(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
            both = feature(part, unit, lambda: torch.cat(own(*args, **more), dim=1))
            return both[:, :-text], both[:, -text:]

        def of_layer(*args: Any, **more: Any) -> Tensor:
            return feature(part, unit, lambda: own(*args, **more))

        layer.forward = of_attn if attention else of_layer

    doubles = judge.transformer_blocks
    for i, block in enumerate(doubles):
        hook(block.attn, "image", 2 * i, attention=True)
        hook(block.ff, "image", 2 * i + 1)
        hook(block.ff_context, "text", 2 * i + 1)
    for i, block in enumerate(judge.single_transformer_blocks):
        hook(getattr(block, single), "image", 2 * len(doubles) + i)
    try:
        yield
    finally:
        for layer, forward in originals:
            layer.forward = forward


def model_of(judge: Any, shape: tuple[int, int]) -> Callable[[Tensor, float], Tensor]:
    """Latents (N, C, H, W) and a timestep to the prediction of diffusers."""
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    height, width = shape
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(
        2, height // 2, width // 2, "cpu", torch.float32
    )

    def run(x: Tensor, t: float) -> Tensor:
        output = judge(
            hidden_states=packed(x.numpy()),
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            timestep=torch.full((2,), t / 1000),
            img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3),
            guidance=torch.full((2,), GUIDANCE),
        ).sample
        return diffusers.FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)

    return run


def eager_latents(
    judge: Any, schedule: Schedule, table: SamplerTable, noise: np.ndarray
) -> np.ndarray:
    """The final latents of diffusers' model, whose features a schedule replaces."""
    caches = {part: Cache(schedule) for part in ("image", "text")}
    run, x, step_of = model_of(judge, noise.shape[2:]), torch.from_numpy(noise), table_step(table)
    with (
        torch.inference_mode(),
        cached_units(judge, lambda part, unit, compute: caches[part](unit, compute)),
    ):
        for step, t in enumerate(table.timesteps):
            for cache in caches.values():
                cache.step = step
            m = run(x, float(t))
            x = step_of(step, x, m, m, torch.zeros_like(x))
    return x.numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS[:4])
def test_latents_are_those_of_diffusers_with_hooked_blocks(
    judge: Any, engine: Path, plan: str, size: tuple[int, int]
) -> None:
    noise = noise_of(SIZES[size])
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec), latents=noise, size=size, guidance=GUIDANCE
        ).latents
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    table = table.at(SIZES[size][0] * SIZES[size][1] // 4)
    assert relative_l2(found, eager_latents(judge, schedule, table, noise)) < 1e-4


@pytest.fixture(scope="module", params=[4, 10, 28, 50])
def uncached(request: pytest.FixtureRequest, engine: Path) -> Iterator[Any]:
    """The pipeline without a cache, with another number of steps."""
    name = f"uncached-{request.param}"
    goc_deploy.add_plan(engine, "none", name=name, steps=request.param)
    with goc_deploy.load(engine, plan=name) as pipe:
        yield pipe


def test_the_loop_of_the_pipeline_is_followed(pipeline: Any, uncached: Any) -> None:
    """At two sizes in turn, whose steps differ, so that the numbers are uploaded again."""
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    for size in (*SIZES, *SIZES):
        noise = noise_of(SIZES[size])
        found = uncached.generate(
            prompt_embeds=captions_of(uncached.spec), latents=noise, size=size, guidance=GUIDANCE
        ).latents
        theirs = pipeline(
            **given, width=size[0], height=size[1], num_inference_steps=uncached.plan.steps,
            guidance_scale=GUIDANCE, latents=packed(noise), output_type="latent",
        ).images  # fmt: skip
        expected = diffusers.FluxPipeline._unpack_latents(theirs, size[1], size[0], 8).numpy()
        assert relative_l2(found, expected) < 1e-3
    assert len({tuple(uncached.plan.sampler.at(tokens).timesteps) for tokens in (24, 15)}) == 2


def test_a_negative_caption_guides_as_in_the_pipeline(pipeline: Any, engine: Path) -> None:
    """Two rows per image, beside the guidance scale that the model embeds."""
    draw, noise = np.random.default_rng(5).standard_normal, noise_of((10, 6))
    negative = {
        "negative_prompt_embeds": draw((1, TEXT, 20)).astype(np.float32),
        "negative_pooled_prompt_embeds": draw((1, 28)).astype(np.float32),
    }
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    given |= {n: torch.from_numpy(values.repeat(2, axis=0)) for n, values in negative.items()}
    with goc_deploy.load(engine, plan="none") as pipe:
        embeds = prompt_embeds_from_arrays({**arrays(), **negative}, pipe.spec, "")
        found = pipe.generate(
            prompt_embeds=embeds, latents=noise, size=(48, 80), guidance=GUIDANCE, cfg_scale=2.0
        ).latents
    theirs = pipeline(
        **given, width=48, height=80, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        true_cfg_scale=2.0, latents=packed(noise), output_type="latent",
    ).images  # fmt: skip
    expected = diffusers.FluxPipeline._unpack_latents(theirs, 80, 48, 8).numpy()
    assert relative_l2(found, expected) < 1e-3


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_sums_take_the_place_of_features(engine: Path, plan: str) -> None:
    check_that_sums_take_the_place_of_features(
        engine, plan, lambda spec: {"prompt_embeds": captions_of(spec), "size": (48, 80)}
    )


def test_a_collapsed_step_reads_no_text(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:10", max_sessions=1) as pipe:
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=captions_of(pipe.spec))


def test_the_guidance_scale_and_the_pooled_caption_matter(engine: Path) -> None:
    given, results = arrays(), []
    other = {**given, "pooled_prompt_embeds": given["pooled_prompt_embeds"][::-1]}
    with goc_deploy.load(engine, plan="fora:10") as pipe:
        for chosen, guidance in ((given, 2.5), (given, 6.0), (other, 2.5)):
            embeds = prompt_embeds_from_arrays(chosen, pipe.spec, "")
            done = pipe.generate(prompt_embeds=embeds, seed=1, guidance=guidance)
            results.append(done.latents)
    assert relative_l2(results[1], results[0]) > 1e-3
    assert relative_l2(results[2], results[0]) > 1e-3
