"""Fitting heads on the golden engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api import cpu_backend
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.api.plans import compiled_plan
from goc_deploy.conditions.captions import PromptEmbeds, conditions_from_labels
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import CalibrationNeededError, ConflictError, UsageError
from goc_deploy.options import PlanOptions, Progress, no_progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import head_from_policy, schedule_from_policy
from goc_deploy.runtime.calibration.head_images import HeadImages
from goc_deploy.runtime.calibration.head_task import spread_scales
from goc_deploy.runtime.calibration.stepper import load_stepper
from goc_deploy.runtime.request import Drawing
from goc_deploy.samplers import SamplerTable, sampler_table, table_at
from goc_deploy.samplers.head_features import head_correction, head_weights
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule

STEPS, IMAGES = 6, 24
SPEC = "fora:2+lagrange:1+head:patch"
OPTIONS = CalibrationOptions(IMAGES, 5, 2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "goc_deploy" / "heads"


@pytest.fixture(scope="module")
def directory(golden_engine: Path) -> EngineDir:
    return EngineDir.open(golden_engine)


def fit(
    directory: EngineDir,
    spec: str = SPEC,
    sampler: str = "ddim",
    progress: Progress = no_progress,
    steps: int = STEPS,
) -> tuple[Schedule, SamplerTable]:
    laboratory = EngineLaboratory(directory, cpu_backend, sampler, OPTIONS, progress)
    policy = parse_policy(spec)
    head = head_from_policy(policy)
    assert head is not None
    schedule = schedule_from_policy(policy, directory.manifest.model, steps, laboratory)
    table = sampler_table(sampler, steps, Process("eps"))
    return laboratory.with_head(schedule, table, replace(head, images=head.images or IMAGES))


def with_batches_of(directory: EngineDir, images: int) -> EngineDir:
    manifest = replace(directory.manifest, max_batch=images)
    return replace(directory, manifest=manifest)


@pytest.mark.parametrize(
    "features", ["scalar", "patch", "hidden", "squares", "patch,level=residual"]
)
def test_a_head_lowers_the_held_out_error(directory: EngineDir, features: str, cache: Path) -> None:
    schedule, table = fit(directory, f"fora:2+lagrange:1+head:{features}")
    assert table.head is not None
    record = schedule.provenance["head"]
    assert record["held_out_images"] == IMAGES // 8
    assert record["held_out_error"] < 0.9 * record["held_out_error_without"]
    assert table.head.shape == (
        STEPS,
        table.head.form.width(directory.manifest.model),
        table.head.form.cell_values(directory.manifest.model),
    )
    assert table.head.cfg_scales == (2.0, 2.0)
    assert not list(cache.iterdir())
    gains = record["by_step"]
    assert [gain["step"] for gain in gains] == list(range(STEPS))
    for gain, weights in zip(gains, head_weights(table.head), strict=True):
        assert gain["held_out"][1] <= gain["held_out"][0]
        assert weights.any() == (gain["penalty"] is not None)


def test_the_recorded_error_is_that_of_the_weights(directory: EngineDir) -> None:
    schedule, table = fit(directory)
    head, record, spec = table.head, schedule.provenance["head"], directory.manifest.model
    assert head is not None
    stepper = load_stepper(directory, cpu_backend(), replace(table, head=None), 3)
    told = _task_drawing(stepper.captions, directory)
    images = [i for i in range(IMAGES) if i % 8 == 7]
    corrected, uncached = [], []
    for image in images:
        request = told.request(range(image, image + 1), 1)
        batch = HeadImages(stepper, request, schedule, head.form)
        for step in range(STEPS):
            features = batch.advance(step)
            weights = head_weights(head)[step]
            batch.trajectory.latents = batch.trajectory.latents + head_correction(
                weights, features, head.form, spec
            )
        corrected.append(batch.trajectory.latents)
        everything = schedule_from_policy(parse_policy("none"), spec, STEPS)
        batch = HeadImages(stepper, request, everything, head.form)
        for step in range(STEPS):
            batch.advance(step)
        uncached.append(batch.trajectory.latents)
    errors = [
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(corrected, uncached, strict=True)
    ]
    assert np.mean(errors) == pytest.approx(record["held_out_error"], rel=1e-2)
    assert np.median(errors) == pytest.approx(record["held_out_median"], rel=1e-2)


def _task_drawing(captions: PromptEmbeds | None, directory: EngineDir) -> Drawing:
    spec = directory.manifest.model
    labels = balanced_labels(spec.choices, IMAGES, OPTIONS.seed)
    keys = [(OPTIONS.seed, image) for image in range(IMAGES)]
    scales = np.full(IMAGES, OPTIONS.cfg_scale)
    return Drawing(conditions_from_labels(labels, spec, captions), keys, scales, 3, spec.latents)


class Killed(Exception):
    """Stands for the end of a process."""


def killing(after: int) -> Progress:
    """A progress that ends the fit at a call."""
    calls = count(1)

    def progress(*_: object) -> None:
        if next(calls) == after:
            raise Killed

    return progress


def told_in(jobs: list[str]) -> Progress:
    """A progress that appends the names of the jobs."""
    return lambda what, *_: jobs.append(what)


@pytest.mark.parametrize(
    ("spec", "sampler"),
    [
        (f"{SPEC},level=residual", "dpm++"),
        ("fora:2+head:hidden,skip_predicted", "ddim"),
        ("none+head:scalar", "ddim"),
    ],
)
def test_a_killed_fit_goes_on_and_results_in_the_same_bytes(
    directory: EngineDir, spec: str, sampler: str, cache: Path
) -> None:
    small = with_batches_of(directory, 9)
    _, whole = fit(small, spec, sampler)
    calls: list[str] = []
    fit(small, spec, sampler, progress=told_in(calls))
    for after in np.random.default_rng(0).choice(len(calls), 2, replace=False) + 1:
        with pytest.raises(Killed):
            fit(small, spec, sampler, progress=killing(int(after)))
        assert list(cache.iterdir())
        again: list[str] = []
        _, resumed = fit(small, spec, sampler, progress=told_in(again))
        assert resumed == whole
        if "step 3" in calls[after - 1]:
            assert not any("step 1 of" in what for what in again)
        assert not list(cache.iterdir())


def test_the_size_of_batches_changes_only_rounding(directory: EngineDir) -> None:
    records = [fit(with_batches_of(directory, size))[0].provenance["head"] for size in (5, 16)]
    for key in ("held_out_error", "held_out_error_without", "held_out_median"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-2)


def test_without_predicted_steps_the_plan_is_one_of_exactly_the_computed_steps(
    directory: EngineDir,
) -> None:
    schedule, table = fit(directory, "fora:2+lagrange:1+head:patch,skip_predicted")
    expected = schedule_from_policy(parse_policy("none"), directory.manifest.model, STEPS // 2)
    assert replace(schedule, policy="none") == expected
    whole = sampler_table("ddim", STEPS, Process("eps"))
    bare = table_at("ddim", whole.timesteps[::2], Process("eps"))
    assert replace(table, head=None) == bare
    record = schedule.provenance["head"]
    assert record["held_out_error"] < record["held_out_error_without"]


def test_a_head_may_aim_at_the_converged_solution(directory: EngineDir) -> None:
    schedule, table = fit(directory, "none+head:patch,target=converged,images=8", steps=3)
    assert table.head is not None
    assert schedule.provenance["head"]["target"] == "converged"
    assert schedule.provenance["head"]["held_out_error_without"] > 0


def test_a_range_of_guidance_scales_is_covered_by_every_part_of_the_images(
    directory: EngineDir,
) -> None:
    scales = spread_scales(2.0, 6.0, 64)
    assert scales.min() >= 2
    assert scales.max() <= 6
    for part in scales.reshape(4, 16):
        assert np.histogram(part, 4, (2, 6))[0].min() >= 2
    _, table = fit(directory, f"{SPEC},scaled,scales=1..3,images=16")
    assert table.head is not None
    assert table.head.cfg_scales == (1.0, 3.0)
    assert table.head.form.scaled


@pytest.mark.parametrize(
    ("spec", "sampler", "message"),
    [
        (SPEC, "ddim:1", "draws fresh noise, so there are no latents to aim at"),
        ("fora:2+head:patch,skip_predicted", "ddim:1", "draws fresh noise"),
    ],
)
def test_what_cannot_have_a_head_is_refused(
    directory: EngineDir, spec: str, sampler: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit(directory, spec, sampler)


def test_a_fit_in_another_process_is_waited_for(
    directory: EngineDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("goc_deploy.disk.LOCK_SECONDS", 0.1)
    refused: list[str] = []

    def second(*_: object) -> None:
        if not refused:
            refused.append("")
            with pytest.raises(ConflictError, match="another process is writing"):
                fit(directory)

    fit(directory, progress=second)
    assert refused


def test_a_plan_with_a_head_needs_an_engine(directory: EngineDir) -> None:
    with pytest.raises(CalibrationNeededError, match="a head calibrates"):
        compiled_plan(directory, SPEC, PlanOptions(steps=STEPS), None)
    with pytest.raises(UsageError, match="at least 8 calibration images, got 4"):
        compiled_plan(directory, SPEC, PlanOptions(steps=STEPS, calibrate=4), cpu_backend)
