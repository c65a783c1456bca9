"""Which plan is compared with which, on which labels, and sets of images with sets of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.errors import UsageError
from goc_deploy.evaluation.distribution import (
    FeatureSet,
    Reference,
    check_widths,
    distribution_metrics,
)
from goc_deploy.evaluation.features import Extracted
from goc_deploy.evaluation.pairing import PairedScores, baselines
from goc_deploy.evaluation.sampling import Sampled, class_labels
from goc_deploy.metrics.frechet import gaussian_of
from goc_deploy.samplers import table_at
from goc_deploy.samplers.head import Head, HeadForm
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 4, 1, 10, False)


def plan(name: str, steps: int, interval: int, sampler: str = "ddim") -> Plan:
    rows = tuple((COMPUTE if k % interval == 0 else REUSE,) * SPEC.units for k in range(steps))
    return compile_schedule(Schedule(SPEC.depth, SPEC.branches, rows), SPEC, sampler, name=name)


def test_a_plan_is_compared_with_no_cache_at_its_steps_and_sampler_or_else_with_the_first() -> None:
    found = baselines(
        [
            plan("cached 8", 8, 2),
            plan("whole 6", 6, 1),
            plan("whole 8", 8, 1),
            plan("cached 6", 6, 3),
            plan("cached 9", 9, 2),
            plan("cached 8 dpm++", 8, 2, "dpm++"),
        ]
    )
    assert found == {
        "cached 8": "whole 8",
        "whole 6": "whole 6",
        "whole 8": "whole 8",
        "cached 6": "whole 6",
        "cached 9": "whole 6",
        "cached 8 dpm++": "whole 6",
    }


def test_a_head_or_other_timesteps_make_another_plan_than_no_cache() -> None:
    first, whole = plan("whole 20", 20, 1), plan("whole 4", 4, 1)
    process = Process(SPEC.prediction_type)
    chosen = replace(whole, name="chosen", sampler=table_at("ddim", [999, 500, 100, 20], process))
    width, values = HeadForm("patch").width(SPEC), HeadForm("patch").cell_values(SPEC)
    head = Head(HeadForm("patch"), (4.0, 4.0), (4, width, values), bytes(16 * width * values))
    corrected = replace(whole, name="corrected", sampler=replace(whole.sampler, head=head))
    assert baselines([first, corrected, chosen]) == {
        "whole 20": "whole 20",
        "corrected": "whole 20",
        "chosen": "chosen",
    }
    assert baselines([first, whole, corrected])["corrected"] == "whole 4"


def test_plans_that_all_cache_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="no plan computes everything"):
        baselines([plan("cached", 8, 2)])


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**40))
def test_balanced_labels_have_every_class_equally_often_in_an_order_of_the_seed(
    images: int, classes: int, seed: int
) -> None:
    found = class_labels("balanced", images, classes, seed)
    counts = np.bincount(found, minlength=classes)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(found, class_labels("balanced", images, classes, seed))


def test_labels_are_not_sorted_and_iid_ones_not_balanced() -> None:
    balanced, drawn = (class_labels(kind, 1000, 10, 0) for kind in ("balanced", "iid"))
    assert (np.diff(balanced) < 0).sum() > 300
    assert len(set(np.bincount(drawn))) > 1
    assert len(set(np.bincount(balanced))) == 1
    with pytest.raises(UsageError, match="labels 'sorted' is not one of balanced, iid"):
        class_labels("sorted", 10, 10, 0)


def batch(latents: np.ndarray, trajectory: np.ndarray | None = None) -> Sampled:
    pictures = np.clip(127.5 * latents + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return Sampled(latents, pictures, trajectory, {})


def test_scores_of_batches_are_those_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 7, 1, 12, 12)).astype(np.float32)
    steps = generator.normal(size=(2, 3, 7, 1, 12, 12)).astype(np.float32)
    whole, parts = PairedScores(), PairedScores()
    whole.add(batch(x, steps[0]), batch(y, steps[1]))
    for rows in (slice(0, 3), slice(3, 7)):
        parts.add(batch(x[rows], steps[0][:, rows]), batch(y[rows], steps[1][:, rows]))
    assert whole.estimates(0) == parts.estimates(0)
    assert whole.estimates(0).keys() == {"relative_l2", "psnr_db", "ssim"}
    assert whole.step_errors() == pytest.approx(parts.step_errors())
    assert len(whole.step_errors() or []) == 3


def test_other_step_counts_are_compared_at_the_end_only() -> None:
    scores = PairedScores()
    x = np.ones((2, 1, 4, 4), np.float32)
    scores.add(batch(x, np.ones((5, 2, 1, 4, 4))), batch(2 * x, np.ones((9, 2, 1, 4, 4))))
    assert scores.step_errors() is None
    assert scores.estimates(0)["relative_l2"].value == pytest.approx(0.5)
    assert "ssim" not in scores.estimates(0)  # smaller than its window


def feature_set(
    features: np.ndarray, logits: np.ndarray | None = None, sizes: Sequence[int] = (20, 30)
) -> FeatureSet:
    found = FeatureSet(len(features))
    for first, stop in zip((0, *np.cumsum(sizes)[:-1]), np.cumsum(sizes), strict=True):
        rows = slice(int(first), int(stop))
        part = features[rows]
        found.add(Extracted(part, None if logits is None else logits[rows], part[:, :2]))
    return found


def test_a_set_equals_itself_and_not_a_shifted_one() -> None:
    features = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    logits = np.eye(3, dtype=np.float32)[np.arange(50) % 3] * 20
    labels = np.arange(50) % 3
    samples = feature_set(features, logits)
    np.testing.assert_array_equal(samples.features, features)
    spatial = samples.spatial
    assert spatial is not None
    reference = Reference(gaussian_of(features), spatial, features, 50)
    same = distribution_metrics(samples, labels, 3, reference, 5, 0)
    assert same["fid"].value == pytest.approx(0, abs=1e-6)
    assert same["sfid"].value == pytest.approx(0, abs=1e-6)
    assert same["precision"].value == same["recall"].value == same["agreement"].value == 1
    assert same["inception_score"].value == pytest.approx(3, rel=0.01)
    assert same["inception_score"].low < same["inception_score"].high
    far = distribution_metrics(feature_set(features + np.float32(9)), labels, 3, reference, 0, 0)
    assert far["fid"].value == pytest.approx(4 * 81, rel=1e-4)
    assert far["precision"].value == far["recall"].value == 0
    assert far["fid"].low == far["fid"].high
    assert "agreement" not in far


def test_metrics_that_have_no_meaning_are_left_out() -> None:
    features = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    logits = np.zeros((50, 1008), np.float32)
    statistics_only = Reference(gaussian_of(features), None, None, 0)
    found = distribution_metrics(
        feature_set(features, logits), np.zeros(50), 1000, statistics_only, 0, 0
    )
    assert found.keys() == {"fid", "inception_score"}
    assert distribution_metrics(feature_set(features), np.zeros(50), 10, None, 0, 0) == {}


def test_statistics_of_other_features_are_refused() -> None:
    reference = gaussian_of(np.eye(5))
    check_widths(reference, 5, "x.onnx")
    with pytest.raises(UsageError, match=r"statistics of 5 features but x.onnx has 64"):
        check_widths(reference, 64, "x.onnx")
