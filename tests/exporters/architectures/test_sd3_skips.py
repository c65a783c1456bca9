"""Skip-layer guidance of Stable Diffusion 3: the latents of diffusers, with and without a cache."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.errors import UsageError
from goc_deploy.runtime.pipeline import Pipeline
from tests.exporters.architectures.test_sd3_pipeline import (
    SCALE,
    SIZES,
    STEPS,
    WORDS,
    CachedLayers,
    arrays,
    captions_of,
    noise_of,
    pipeline,
)
from tests.reference import relative_l2, table_step
from tests.stand_ins.onnxruntime import cuda_pipeline

LAYERS = (1, 3)  # a block with a second attention, and the last one
WINDOW = (2.8, 0.01, 0.65)  # the steps 1 to 6 of 10; plans predict for step 7 during step 6
PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2", "fora:5+gc:0.5")
__all__ = ["pipeline"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def engine(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skips")
    pipeline.save_pretrained(folder / "pipeline")
    goc_deploy.export(
        folder / "pipeline", folder / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=SIZES[0], max_size=(96, 96), caption_tokens=WORDS, skip_guidance_layers=LAYERS,
    )  # fmt: skip
    return folder / "engine"


def drawn(pipe: Pipeline, window: Any, **more: Any) -> np.ndarray:
    options = {"latents": noise_of(SIZES[0]), "cfg_scale": SCALE, "decode": False, **more}
    embeds = captions_of(pipe.spec)
    return pipe.generate(prompt_embeds=embeds, skip_layer_guidance=window, **options).latents


@pytest.mark.parametrize("window", [(2.8, 0.01, 0.65), (1.5, 0.25, 1.0)])
def test_latents_are_those_of_the_pipeline(
    pipeline: Any, engine: Path, window: tuple[float, float, float]
) -> None:
    noise, (scale, start, stop) = noise_of(SIZES[0]), window
    with goc_deploy.load(engine, plan="none") as pipe:
        found, without = drawn(pipe, window), drawn(pipe, None)
        given = {name: torch.from_numpy(values) for name, values in arrays(pipe.spec).items()}
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        given[name] = torch.cat([given[name]] * 2)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        **given, latents=torch.from_numpy(noise), height=SIZES[0][1], width=SIZES[0][0],
        num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent",
        skip_guidance_layers=list(LAYERS), skip_layer_guidance_scale=scale,
        skip_layer_guidance_start=start, skip_layer_guidance_stop=stop,
    ).images  # fmt: skip
    assert relative_l2(found, expected.numpy()) < 1e-4
    assert relative_l2(without, expected.numpy()) > 1e-2


@torch.inference_mode()
def eager_latents(judge: Any, pipe: Pipeline, noise: np.ndarray) -> np.ndarray:
    """Final latents of diffusers' transformer, with a cache for each of its two passes."""
    schedule, table = pipe.plan.schedule, pipe.plan.sampler
    given = {name: torch.from_numpy(values) for name, values in arrays(pipe.spec).items()}
    captions, pooled = (
        torch.cat([given[name], given[f"negative_{name}"].expand_as(given[name])])
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    scale, start, stop = WINDOW
    passes = [deepcopy(judge) for _ in range(2)]
    caches = [CachedLayers(model, schedule) for model in passes]
    x, step_of = torch.from_numpy(noise), table_step(table)
    for step, t in enumerate(table.timesteps):
        for cache in caches:
            cache.step = step
        output = passes[0](torch.cat([x, x]), captions, pooled, torch.full((4,), t)).sample
        cond, uncond = output.chunk(2)
        guided = uncond + SCALE * (cond - uncond)
        if step < stop * STEPS:  # the history of the second pass starts with the first step
            time = torch.full((2,), t)
            skipped = passes[1](x, captions[:2], pooled[:2], time, skip_layers=list(LAYERS)).sample
            guided += (cond - skipped) * scale * (step > start * STEPS)
        zeros = torch.zeros_like(x)
        x = step_of(step, x, guided, zeros, zeros)
    return x.numpy()


@pytest.mark.parametrize("plan", PLANS)
def test_every_form_of_a_plan_is_diffusers_with_hooked_layers(
    pipeline: Any, engine: Path, plan: str
) -> None:
    for history in ("features", "sums"):
        if plan == "none" and history == "sums":
            continue
        with goc_deploy.load(engine, plan=plan, history=history) as pipe:
            found = drawn(pipe, WINDOW)
            expected = eager_latents(pipeline.transformer, pipe, noise_of(SIZES[0]))
        assert relative_l2(found, expected) < 1e-4
    gpu, _ = cuda_pipeline(engine, plan)  # steps share launches, and are recorded
    with gpu:
        for _ in range(2):
            assert relative_l2(drawn(gpu, WINDOW), expected) < 1e-4


def test_an_image_that_is_not_guided_does_not_change(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        both, usual = (drawn(pipe, window, cfg_scale=[1.0, SCALE]) for window in (WINDOW, None))
        guided = drawn(pipe, WINDOW)
    np.testing.assert_array_equal(both[0], usual[0])
    np.testing.assert_array_equal(both[1], guided[1])


def test_the_default_window_is_that_of_the_pipeline(engine: Path) -> None:
    with goc_deploy.load(engine, plan="none") as pipe:
        embeds = captions_of(pipe.spec)
        results = [
            pipe.generate(prompt_embeds=embeds, skip_layer_guidance=given, decode=False)
            for given in (2.8, (2.8, 0.01, 0.2))
        ]
    assert (results[0].report["skip_layer_guidance"], results[0].report["skip_layer_steps"]) == (
        2.8,
        [1],
    )
    np.testing.assert_array_equal(results[0].latents, results[1].latents)


@pytest.mark.parametrize(
    ("given", "more", "told"),
    [
        (2.8, {"cfg_scale": 1.0}, "no image is guided"),
        (2.8, {"cfg_channels": 0}, "no image is guided"),
        (-1.0, {}, r"skip_layer_guidance must be a number within 0\.\.1000"),
        ("2.8", {}, r"skip_layer_guidance must be a number within 0\.\.1000"),
        ((2.8, 0.1), {}, "must be a scale, or a scale, a start and a stop"),
        ((2.8, 0.2, 0.2), {}, "none of 10 is after 2 and before 2; give an earlier start"),
    ],
)
def test_what_cannot_be_is_refused(
    engine: Path, given: Any, more: dict[str, Any], told: str
) -> None:
    with goc_deploy.load(engine, plan="none") as pipe, pytest.raises(UsageError, match=told):
        drawn(pipe, given, **more)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ((1, 4), "has block 4, but this model has the blocks 0 to 3"),
        ((-1,), "has block -1"),
        ((1, 1), "must be different blocks, and not all 4, got 1, 1"),
        ((3, 2, 1, 0), "must be different blocks, and not all 4"),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    engine: Path, tmp_path: Path, layers: tuple[int, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        goc_deploy.export(
            engine.parent / "pipeline", tmp_path / "e", plans=["none"], skip_guidance_layers=layers
        )
    assert not (tmp_path / "e").exists()
