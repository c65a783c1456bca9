"""Calibration on the golden engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.api import cpu_backend, load
from goc_deploy.conditions.captions import conditions_from_labels
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import CalibrationNeededError, ScheduleError, UsageError
from goc_deploy.options import no_progress
from goc_deploy.policies.calibration import (
    CalibrationOptions,
    Trials,
    default_images,
)
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.runtime.calibration.calibrator import EngineCalibrator, load_calibrator
from goc_deploy.runtime.calibration.stepper import Stepper, load_stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.noise import image_noise
from goc_deploy.runtime.request import Request
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec
from tests.reference import relative_l2
from tests.stand_ins.laboratory import StandInLaboratory

STEPS, IMAGES, SEED, SCALE = 8, 5, 11, 2.0
OPTIONS = CalibrationOptions(IMAGES, SEED, SCALE)


@pytest.fixture(scope="module")
def stepper(golden_engine: Path) -> Stepper:
    directory, table = EngineDir.open(golden_engine), sampler_table("ddim", STEPS, Process("eps"))
    return load_stepper(directory, cpu_backend(), table, 2)


@pytest.fixture(scope="module")
def calibrator(stepper: Stepper) -> EngineCalibrator:
    return EngineCalibrator(stepper, OPTIONS, {"checkpoint_sha256": "0" * 64})


def no_trials() -> Trials:
    raise AssertionError("these policies ask for features only")


@pytest.fixture(scope="module")
def made(calibrator: EngineCalibrator, stepper: Stepper) -> Callable[[str], Schedule]:
    @functools.cache
    def make(text: str) -> Schedule:
        return schedule_from_policy(
            parse_policy(text),
            stepper.spec,
            STEPS,
            StandInLaboratory(lambda _: calibrator, no_trials),
        )

    return make


@functools.cache
def noise() -> np.ndarray:
    return np.stack([image_noise(SEED, image, 1, (4, 8, 8)) for image in range(IMAGES)])


@pytest.fixture(scope="module")
def features(golden_engine: Path, stepper: Stepper) -> np.ndarray:
    """(T, U, B, tokens, D) of all calibration images at once, the obvious way."""
    wide = load_stepper(EngineDir.open(golden_engine), cpu_backend(), stepper.table, IMAGES)
    conditions = conditions_from_labels(balanced_labels(10, IMAGES, SEED), wide.spec, None)
    request = Request(conditions, noise(), np.full(IMAGES, SCALE), 3)
    trajectory, found = Trajectory(wide, request, "computed", 0), []
    for step in range(STEPS):
        row: list[np.ndarray] = []
        trajectory.advance(
            step, (COMPUTE,) * wide.spec.units, lambda _, f, row=row: row.append(f.copy())
        )
        found.append(row)
    return np.array(found)


def test_streamed_statistics_are_those_of_all_features(
    calibrator: EngineCalibrator, features: np.ndarray
) -> None:
    found = calibrator.statistics()
    assert relative_l2(found.means, features.mean(axis=2)) < 1e-5
    per_image = features.reshape(STEPS, features.shape[1], 2, IMAGES, -1)
    for gap in (1, 2, 3):
        change = np.abs(per_image[gap:] - per_image[:-gap]).sum(axis=(2, 4)) / np.abs(
            per_image[gap:]
        ).sum(axis=(2, 4))
        np.testing.assert_allclose(found.changes[gap:, :, gap - 1], change.mean(axis=2), rtol=1e-4)
        assert np.isinf(found.changes[:gap, :, gap - 1]).all()


def test_beyond_the_budget_features_go_to_a_file_and_batches_shrink(
    stepper: Stepper, calibrator: EngineCalibrator
) -> None:
    found = EngineCalibrator(stepper, OPTIONS, {}, budget_bytes=1).statistics()
    assert isinstance(found.means, np.memmap)
    assert relative_l2(found.means, calibrator.statistics().means) < 1e-5
    np.testing.assert_allclose(found.changes, calibrator.statistics().changes, rtol=1e-4)


def test_the_measured_error_is_that_of_the_compiled_plan(golden_engine: Path) -> None:
    options = CalibrationOptions(3, SEED, SCALE)
    table = sampler_table("ddim", 20, Process("eps"))
    directory = EngineDir.open(golden_engine)
    calibrator = load_calibrator(directory, cpu_backend(), table, options, no_progress)
    labels, latents = balanced_labels(10, 3, SEED), {}
    for plan in ("none", "fora:2+gc:1.2"):
        with load(golden_engine, plan=plan) as pipeline:
            latents[plan] = pipeline.generate(labels, seed=SEED, cfg_scale=SCALE).latents
            schedule = pipeline.plan.schedule
    expected = relative_l2(latents["fora:2+gc:1.2"], latents["none"])
    assert calibrator.error(schedule) == pytest.approx(expected, rel=1e-3)
    assert len(calibrator.describe()["checkpoint_sha256"]) == 64
    with pytest.raises(ScheduleError, match="8 steps but the sampler 20"):
        calibrator.error(Schedule(4, ("attn", "mlp"), ((COMPUTE,) * 8,) * 8))


def test_progress_of_a_fit_counts_up_to_its_batches(stepper: Stepper) -> None:
    told: list[tuple[str, int, int]] = []
    calibrator = EngineCalibrator(stepper, OPTIONS, {}, lambda *report: told.append(report))
    laboratory = StandInLaboratory(lambda _: calibrator, no_trials)
    schedule_from_policy(parse_policy("fora:4+fit:2"), stepper.spec, STEPS, laboratory)
    assert ("fitting, pass 1 of 2", 2, 3) in told  # five images, two at once
    assert all(done < total for _, done, total in told)


def test_goc_is_never_worse_on_its_images_than_plain_reuse_and_the_gradient(
    calibrator: EngineCalibrator, made: Callable[[str], Schedule]
) -> None:
    for spec in ("fora:2+goc:1.2", "fora:2+goc:1.2,reading=exists,gamma=0,per_unit"):
        plain, everywhere = (
            calibrator.error(made("fora:2")),
            calibrator.error(made("fora:2+gc:1.2")),
        )
        assert calibrator.error(made(spec)) <= min(plain, everywhere)


def test_a_threshold_and_an_eta_are_taken_as_given(made: Callable[[str], Schedule]) -> None:
    assert made("fora:2+goc:0.7,threshold=2").coefficients == made("fora:2+gc:0.7").coefficients
    assert made("fora:2+goc:0.7,threshold=0").coefficients == made("fora:2").coefficients
    record = made("fora:2+goc:0.7,threshold=0.4").provenance["god"]
    assert record["eta"] == 0.7
    assert record["threshold"] == 0.4
    assert record["gradient_steps"] == [k for k in (3, 5, 7) if record["boundary"][k] < 0.4]
    assert record["calibration"]["images"] == IMAGES


@pytest.mark.parametrize("options", ["", ",fit=global", ":3,history=computed"])
def test_a_fit_to_the_final_latents_is_not_worse_than_where_it_starts(
    calibrator: EngineCalibrator, made: Callable[[str], Schedule], options: str
) -> None:
    history = ",history=computed" if "computed" in options else ""
    starts = [
        calibrator.error(made(f"fora:2{base}{history}")) for base in ("", "+gc:0.5", "+gc:1.0")
    ]
    fitted = made(f"fora:2+fit{options}")
    assert calibrator.error(fitted) <= min(starts) * (1 + 1e-9)
    assert all(abs(sum(row) - 1) < 1e-6 for step in fitted.coefficients for row in step if row)
    assert fitted.provenance["fit"]["error"] == calibrator.error(fitted)


def test_a_fit_per_step_beats_one_gradient_for_all_steps(
    calibrator: EngineCalibrator, made: Callable[[str], Schedule]
) -> None:
    assert calibrator.error(made("fora:2+fit")) < 0.9 * calibrator.error(made("fora:2+gc:1.0"))


def test_smoothcache_computes_less_the_more_it_accepts(made: Callable[[str], Schedule]) -> None:
    computed = [made(f"smoothcache:{alpha}").computed for alpha in (0, 0.3, 0.6, 900)]
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == 8 * 8
    assert computed[-1] == 3 * 8  # steps 0, 4 and the last
    assert made("smoothcache:0.3,per_unit").provenance["smoothcache"]["per_unit"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fora:2+goc:x", "eta must be .*, got 'x'"),
        ("fora:2+goc,gamma=2", "option gamma must be a number within 0..1, got '2'"),
        ("fora:2+goc,reading=some", "option reading must be exists or at_eta, got 'some'"),
        ("fora:2+goc,threshold=low", "option threshold must be a number .* or auto, got 'low'"),
        ("fora:2+fit:5", "entries must be a whole number within 1..4, got '5'"),
        ("fora:2+fit,fit=block", "option fit must be step or global, got 'block'"),
        (
            "fora:2+fit,target=final",
            "option 'target' is not one of history, level, phase, fit, ridge",
        ),
        ("fora:2+fit,ridge=0", "option ridge must be a number above 0, got '0'"),
        ("smoothcache:-1", "alpha must be a number at least 0 or .*, got '-1'"),
        ("smoothcache:much", "alpha must be .*, got 'much'"),
    ],
)
def test_wrong_arguments_are_refused(
    made: Callable[[str], Schedule], text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        made(text)


@pytest.mark.parametrize("text", ["fora:2+goc", "fora:2+fit", "smoothcache:0.1"])
def test_without_an_engine_a_calibrated_policy_says_what_it_needs(
    stepper: Stepper, text: str
) -> None:
    with pytest.raises(
        CalibrationNeededError, match="needs an engine directory; use goc-export or goc-plan"
    ):
        schedule_from_policy(parse_policy(text), stepper.spec, STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "within 1..100000 images"),
        ({"seed": -1}, r"seed must be within 0..2\*\*64-1"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a number"),
    ],
)
def test_options_out_of_range_are_refused(
    stepper: Stepper, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        EngineCalibrator(stepper, CalibrationOptions(**options), {})


def test_labels_are_balanced_and_depend_on_the_seed_alone() -> None:
    labels = balanced_labels(10, 25, 3)
    assert sorted(labels[:10]) == sorted(labels[10:20]) == list(range(10))
    assert balanced_labels(10, 12, 3) == labels[:12]
    assert balanced_labels(10, 25, 4) != labels


def test_large_models_calibrate_on_fewer_images() -> None:
    assert default_images(ModelSpec(4, 64, 4, 256, 2, 4, 4, 10, True), 20) == 16
    assert default_images(ModelSpec(28, 1152, 16, 4608, 2, 16, 4, 1000, True), 20) == 1
