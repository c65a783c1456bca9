"""Plans with heads: on every backend, what NumPy makes of the same features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.api import add_plan
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.spec import ModelSpec
from tests import pixart_reference
from tests.heads import FORMS, HeadTrajectory, add_head
from tests.reference import relative_l2, worst_step
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline
from tests.stand_ins.onnxruntime import cuda_pipeline

LABELS, SCALES = [1, 7, 4], [4.0, 1.0, 1.5]
# Plan -> the arguments that add it. The second has mixed steps, the others sample with history,
# a learned variance or fresh noise.
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "fora": ("fora:2", {"steps": 8}),
    "gradient": ("fora:3@0.5+gc:0.8", {"steps": 8}),
    "dpm": ("fora:2+gc:1.0", {"steps": 8, "sampler": "dpm++:3"}),
    "learned": ("fora:2", {"steps": 8, "sampler": "ddpm"}),
    "noisy": ("fora:2", {"steps": 8, "sampler": "ddim:0.7"}),
}


@pytest.fixture(scope="module")
def engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden engine with plans that have heads of every form."""
    target = Path(shutil.copytree(golden_engine, tmp_path_factory.mktemp("heads") / "engine"))
    for name, (spec, options) in PLANS.items():
        add_plan(target, spec, name=name, **options)
        add_head(target, name, FORMS["hidden3-2"])
        add_head(target, name, FORMS["hidden3-2"], strength=0)
    for form in FORMS.values():
        for name in ("fora", "dpm"):
            add_head(target, name, form)
            add_head(target, name, form, strength=0)
    return target


@pytest.fixture(scope="module")
def on_device(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the engines of the stand-in for TensorRT."""
    return copy_with_engines(engine, tmp_path_factory.mktemp("device") / "engine", "shared")


def expected(
    engine: Path, plan: str, with_head: str, images: int = 3, **request: Any
) -> np.ndarray:
    """The trajectory by NumPy."""
    head = EngineDir.open(engine).plan(with_head).sampler.head
    assert head is not None
    labels = request.pop("labels", LABELS)
    with goc_deploy.load(engine, plan=plan, backend="onnxruntime") as pipe:
        scales = request.get("cfg_scale", SCALES)
        drawing = pipe._drawing(
            labels, request.get("captions"), 5, 0, scales, pipe.spec.guided_channels, None
        )
        made = drawing.request(range(images), pipe._draws, pipe._latent_shape)
        return HeadTrajectory(pipe, head, made).run()


def trajectory(pipe: Pipeline, labels: list[int] = LABELS, **request: Any) -> np.ndarray:
    given = {"cfg_scale": SCALES, "seed": 5, "trajectory": True, **request}
    found = pipe.generate(labels, **given).trajectory
    assert found is not None
    return found


CASES = [("fora", signature) for signature in FORMS] + [
    *(("dpm", signature) for signature in FORMS),
    *((name, "hidden3-2") for name in ("gradient", "learned", "noisy")),
]


@pytest.mark.parametrize(("plan", "form"), CASES)
def test_a_head_of_zeros_changes_no_bit(engine: Path, plan: str, form: str) -> None:
    with (
        goc_deploy.load(engine, plan=plan, backend="onnxruntime") as without,
        goc_deploy.load(engine, plan=f"{plan}+{form}-zero", backend="onnxruntime") as zero,
    ):
        np.testing.assert_array_equal(trajectory(zero), trajectory(without))


@pytest.mark.parametrize(("plan", "form"), CASES)
def test_a_head_adds_what_numpy_adds(engine: Path, plan: str, form: str) -> None:
    name = f"{plan}+{form}"
    reference = expected(engine, plan, name)
    with (
        goc_deploy.load(engine, plan=plan, backend="onnxruntime") as without,
        goc_deploy.load(engine, plan=name, backend="onnxruntime") as pipe,
    ):
        for _ in range(2):  # nothing of a request is left for the next
            assert worst_step(trajectory(pipe), reference) < 1e-5
        assert relative_l2(reference[-1], trajectory(without)[-1]) > 0.02


@pytest.mark.parametrize(("plan", "form"), CASES)
def test_devices_that_share_launches_run_heads_like_the_host(
    engine: Path, on_device: Path, plan: str, form: str
) -> None:
    name = f"{plan}+{form}"
    reference = expected(engine, plan, name)
    for pipe, _ in (stand_in_pipeline(on_device, name), cuda_pipeline(engine, name)):
        for _ in range(3):  # launched, recorded, replayed
            assert worst_step(trajectory(pipe), reference) < 1e-5


def test_a_head_needs_no_more_recorded_graphs(on_device: Path) -> None:
    recorded = []
    for name in ("fora", "fora+hidden3-2"):
        pipe, _ = stand_in_pipeline(on_device, name)
        for _ in range(2):
            report = pipe.generate([1]).report
        recorded.append(report["recorded_graphs"])
    assert recorded[0] == recorded[1] == 2


@pytest.mark.parametrize("scales", [[4.0, 4.0], [1.0, 1.0], [1.0, 3.0]])
def test_images_of_other_scales_in_a_batch_change_nothing(
    engine: Path, scales: list[float]
) -> None:
    with goc_deploy.load(engine, plan="fora+hidden2-1s", backend="onnxruntime") as pipe:
        together = trajectory(pipe, [1, 7], cfg_scale=scales, seed=[5, 6])
        for image, scale in enumerate(scales):
            alone = trajectory(pipe, [[1, 7][image]], cfg_scale=scale, seed=[5, 6][image])
            assert worst_step(together[:, image : image + 1], alone) < 1e-5


@pytest.mark.parametrize("form", ["patch3", "hidden3-2"])
def test_a_flow_has_heads(tmp_path: Path, form: str) -> None:
    spec, engine = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, True), tmp_path / "engine"
    torch.save(random_state(spec, 3), tmp_path / "sit.pt")
    more = {"model": "sit", "num_heads": 3, "steps": 6, "max_batch": 3}
    goc_deploy.export(tmp_path / "sit.pt", engine, plans=["fora:2"], **more)
    name = add_head(engine, "fora-2", FORMS[form])
    with goc_deploy.load(engine, plan=name, backend="onnxruntime") as pipe:
        assert worst_step(trajectory(pipe), expected(engine, "fora-2", name)) < 1e-5


def captions(spec: ModelSpec) -> PromptEmbeds:
    generator, shape = np.random.default_rng(1), (3, spec.caption_tokens, spec.caption_channels)
    embeds = generator.standard_normal(shape).astype(np.float32)
    mask = np.ones(shape[:2], np.int64)
    names = ("prompt_embeds", "prompt_attention_mask")
    arrays = dict(zip(names, (embeds[:2], mask[:2]), strict=True))
    arrays |= {f"negative_{n}": a for n, a in zip(names, (embeds[2:], mask[2:]), strict=True)}
    return prompt_embeds_from_arrays(arrays, spec, "given")


def test_a_model_that_draws_captions_has_heads(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    torch.save({"state_dict": pixart_reference.random_state()}, tmp_path / "model.pth")
    more = {"num_heads": 3, "sampler": "dpm++", "steps": 6, "max_batch": 2}
    goc_deploy.export(tmp_path / "model.pth", engine, plans=["fora:2+gc:1.0"], **more)
    name = add_head(engine, "fora-2+gc-1.0", FORMS["hidden3-2"])
    with goc_deploy.load(engine, plan=name, backend="onnxruntime") as pipe:
        request = {"captions": captions(pipe.spec), "cfg_scale": [4.5, 2.0]}
        found = trajectory(pipe, [0, 1], **request)
    reference = expected(engine, "fora-2+gc-1.0", name, 2, labels=[0, 1], **request)
    assert worst_step(found, reference) < 1e-5
