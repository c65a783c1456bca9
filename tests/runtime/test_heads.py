"""Plans with heads: on every backend, what NumPy makes of the same features."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.api import add_plan, cpu_backend
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.runtime import buffers
from goc_deploy.runtime.constants import constants_from_plan
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.spec import ModelSpec
from tests import pixart_reference
from tests.conftest import GOLDEN
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
        drawing = pipe.drawing(labels, request.get("prompt_embeds"), seed=5, cfg_scale=scales)
        made = drawing.request(range(images), pipe.draws)
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
        request = {"prompt_embeds": captions(pipe.spec), "cfg_scale": [4.5, 2.0]}
        found = trajectory(pipe, [0, 1], **request)
    reference = expected(engine, "fora-2+gc-1.0", name, 2, labels=[0, 1], **request)
    assert worst_step(found, reference) < 1e-5


def test_planned_bytes_include_what_a_head_keeps_and_its_weights(engine: Path) -> None:
    for name in ("fora+patch3", "fora+hidden3-2"):
        with goc_deploy.load(engine, plan=name, backend="onnxruntime") as pipe:
            spec, images, plan = pipe.spec, pipe.batch_size, pipe.plan
            held = buffers.allocate_buffers(cpu_backend(), spec, "fp32", plan, images)
            assert pipe.generate([1]).report["buffer_bytes"] == buffers.planned_bytes(
                spec, "fp32", plan, images
            )
        of_head = held.head
        assert of_head is not None
        kept = [*of_head.outputs, of_head.no_output, *of_head.tokens]
        kept += [] if of_head.no_tokens is None else [of_head.no_tokens]
        without = replace(plan, sampler=replace(plan.sampler, head=None))
        rows, fewer = (constants_from_plan(one).nbytes for one in (plan, without))
        assert sum(buffer.nbytes for buffer in kept) + rows - fewer == buffers.planned_bytes(
            spec, "fp32", plan, images
        ) - buffers.planned_bytes(spec, "fp32", without, images)


def test_engines_in_half_precision_run_heads_within_their_precision(
    tmp_path: Path, engine: Path
) -> None:
    target, options = tmp_path / "engine", {"num_heads": 4, "steps": 8, "max_batch": 3}
    goc_deploy.export(GOLDEN / "model.pt", target, precision="fp16", plans=["fora:2"], **options)
    name = add_head(target, "fora-2", FORMS["hidden3-2"])
    built = copy_with_engines(target, tmp_path / "built", "shared")
    reference = expected(engine, "fora", "fora+hidden3-2")
    pipe, _ = stand_in_pipeline(built, name)
    for _ in range(2):
        assert worst_step(trajectory(pipe), reference) < 1e-2


def with_other_weights(engine: Path, target: Path) -> Path:
    """A copy of an engine directory, as if another checkpoint had been exported."""
    shutil.copytree(engine, target)
    manifest = EngineDir.open(target).manifest
    for path in {unit.weights_file for unit in manifest.graphs if unit.weights_file}:
        values = np.fromfile(target / path, np.float32)
        (0.9 * values).tofile(target / path)
    files = tuple(file_entry(target, file.path) for file in manifest.files)
    provenance = {**manifest.provenance, "checkpoint_sha256": "0" * 64}
    changed = replace(manifest, files=files, provenance=provenance)
    (target / MANIFEST_NAME).write_text(manifest_to_json(changed))
    return target


def test_other_weights_are_exchanged_below_a_head(
    engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_other_weights(engine, tmp_path / "other")
    with (
        goc_deploy.load(other, plan="fora+patch3", backend="onnxruntime") as pipe,
        goc_deploy.load(engine, plan="fora+patch3", backend="onnxruntime") as exchanged,
    ):
        about = exchanged.generate([1]).report["head"]
        assert not about["other_weights"]
        exchanged.load_weights(other)
        for _ in range(2):
            found = exchanged.generate(LABELS, seed=5)
        assert found.report["head"]["other_weights"]
        np.testing.assert_array_equal(found.latents, pipe.generate(LABELS, seed=5).latents)
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1
    assert "plan fora+patch3 was fitted with other weights" in messages[0]


def test_a_scale_outside_of_those_that_were_fitted_is_logged_once_and_reported(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with goc_deploy.load(engine, plan="fora+hidden3-2", backend="onnxruntime") as pipe:
        for scales, outside in (
            ([1.0, 8.0, 4.0], False),
            ([4.0, 8.0005, 4.0], False),
            ([4.0, 8.5, 4.0], True),
            ([0.5, 0.5, 0.5], True),
        ):
            about = pipe.generate(LABELS, cfg_scale=scales).report["head"]
            assert about == {
                "features": "hidden",
                "form": "hidden3-2",
                "fitted_cfg_scales": [1.0, 8.0],
                "outside_fitted_cfg_scales": outside,
                "other_weights": False,
            }
        report = pipe.generate([1], cfg_scale=50.0, cfg_channels=0).report  # guides no channel
        assert not report["head"]["outside_fitted_cfg_scales"]
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1
    assert "was fitted for guidance scales 1 to 8, and is used at 8.5" in messages[0]


def test_a_plan_without_a_head_reports_none(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora", backend="onnxruntime") as pipe:
        assert "head" not in pipe.generate([1], cfg_scale=50.0).report
