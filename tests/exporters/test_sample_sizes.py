"""Samples of any size: the same latents as PyTorch at each of them, and refusals by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.engine_dir.keys import dimension_profiles
from goc_deploy.errors import GocError, ModelError, UsageError
from goc_deploy.exporters.architectures.dit_diffusers import position_table
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.runtime.buffers import planned_bytes
from goc_deploy.size_inputs import sine_table
from goc_deploy.spec import ModelSpec
from tests.reference import eager_trajectory, relative_l2, worst_step

SPEC = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, True)  # 8x8 latents
STEPS, LABELS = 4, [1, 7]
PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:2+gc:0.5,level=residual")


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**random_state(SPEC, 3), "pos_embed": position_table(SPEC), **changed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine directories of one checkpoint: of one size, and of any size up to 12x16."""
    folder = tmp_path_factory.mktemp("sizes")
    torch.save(state(), folder / "dit.pt")
    more: dict[str, Any] = {"num_heads": 3, "steps": STEPS, "max_batch": 2, "plans": PLANS}
    goc_deploy.export(folder / "dit.pt", folder / "fixed", **more)
    goc_deploy.export(folder / "dit.pt", folder / "any", max_size=(16, 12), **more)
    return folder


def model_at(rows: int, columns: int) -> DiT:
    """The model in PyTorch, with the table of another size as diffusers computes it."""
    model = DiT(SPEC.at((rows, columns))).eval()
    table = sine_table(SPEC.hidden, rows, columns, SPEC.axes[0], 1.0)
    model.load_state_dict(state(pos_embed=torch.from_numpy(table).reshape(1, -1, SPEC.hidden)))
    return model


@pytest.mark.parametrize("plan", PLANS)
def test_the_usual_size_is_drawn_as_by_an_export_of_that_size(folder: Path, plan: str) -> None:
    results = []
    for name in ("fixed", "any"):
        with goc_deploy.load(folder / name, plan=plan) as pipe:
            results.append(pipe.generate(LABELS, seed=3).latents)
    assert relative_l2(results[1], results[0]) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (3, 5), (4, 12), (1, 1)])
def test_other_sizes_are_drawn_as_pytorch_draws_them(folder: Path, rows: int, columns: int) -> None:
    model, size = model_at(rows, columns), (2 * columns, 2 * rows)
    shape = (2, 4, 2 * rows, 2 * columns)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for plan in PLANS[:3]:
        with goc_deploy.load(folder / "any", plan=plan) as pipe:
            found = pipe.generate(LABELS, latents=noise, size=size, trajectory=True).trajectory
            schedule, table = pipe.plan.schedule, pipe.plan.sampler
        expected = eager_trajectory(model, schedule, table, noise[:, None], LABELS, 4.0)
        assert found is not None
        assert worst_step(found, expected) < 1e-4, plan


def test_sizes_take_turns_on_one_session(folder: Path) -> None:
    with goc_deploy.load(folder / "any", plan="fora:2") as pipe:
        sizes = [(8, 8), (16, 12), (6, 10)]
        alone = [pipe.generate([3], seed=1, size=size).latents for size in sizes]
        again = [pipe.generate([3], seed=1, size=size).latents for size in reversed(sizes)]
    for first, second in zip(alone, reversed(again), strict=True):
        np.testing.assert_array_equal(first, second)
    assert [latents.shape[2:] for latents in alone] == [(8, 8), (12, 16), (10, 6)]


def test_the_report_has_the_size_and_the_memory_of_the_largest_samples(folder: Path) -> None:
    with goc_deploy.load(folder / "any", plan="fora:2+gc:1.0") as pipe:
        reports = [pipe.generate([3], size=size).report for size in (None, (6, 10))]
        largest, plan = pipe.spec.largest, pipe.plan
    assert [report["size"] for report in reports] == [[8, 8], [6, 10]]
    for report in reports:
        assert "frames" not in report
        assert report["buffer_bytes"] == planned_bytes(largest, "fp32", plan, 2)
        assert report["cache_bytes"] == plan.cache_bytes(largest, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (7, 8)}, r"`size` must be a width and a height that 2 divides, got \(7, 8\)"),
        ({"size": 8}, "`size` must be a width and a height"),
        ({"size": (0, 8)}, "`size` must be a width and a height"),
        ({"size": (16, 14)}, "16x14 is more than the engine directory accepts: as many pixels as"),
        ({"size": (34, 2)}, "34x2 is more than the engine directory accepts"),
        ({"frames": 5}, "`frames` is for models of videos"),
        ({"size": (8, 12), "latents": np.zeros((1, 4, 8, 8))}, r"expected \[1, 4, 12, 8\]"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with (
        goc_deploy.load(folder / "any", plan="none") as pipe,
        pytest.raises(UsageError, match=message),
    ):
        pipe.generate([1], **arguments)


def test_an_export_of_one_size_names_the_option_for_others(folder: Path) -> None:
    with goc_deploy.load(folder / "fixed", plan="none") as pipe:
        assert pipe.generate([1], size=(8, 8)).latents.shape == (1, 4, 8, 8)
        with pytest.raises(UsageError, match="draws 8x8 only; export it with `max_size`"):
            pipe.generate([1], size=(8, 12))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": (9, 8)}, UsageError, "`size` must be a width and a height that 2 divides"),
        ({"size": (16, 16), "max_size": (8, 8)}, UsageError, "the usual size 16x16 is larger than"),
        ({"frames": 5}, UsageError, "`frames` is for models of videos"),
    ],
)
def test_sizes_of_an_export_are_checked_before_anything_is_written(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: type[GocError], message: str
) -> None:
    with pytest.raises(error, match=message):
        goc_deploy.export(folder / "dit.pt", tmp_path / "e", num_heads=3, **options)
    assert not (tmp_path / "e").exists()


def test_a_learned_table_has_no_other_sizes(tmp_path: Path) -> None:
    torch.save(random_state(SPEC, 3) | {"pos_embed": torch.randn(1, 16, 48)}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="the position table of the checkpoint was learned"):
        goc_deploy.export(tmp_path / "m.pt", tmp_path / "e", num_heads=3, max_size=(16, 16))


def test_a_head_corrects_the_usual_size_only(folder: Path) -> None:
    goc_deploy.add_plan(folder / "any", "fora:2+head:scalar", name="head", calibrate=8)
    with goc_deploy.load(folder / "any", plan="head") as pipe:
        assert np.isfinite(pipe.generate([1]).latents).all()
        with pytest.raises(UsageError, match="plan head has a head, which corrects samples of the"):
            pipe.generate([1], size=(8, 12))


def test_engines_are_built_for_all_sizes() -> None:
    spec = replace(SPEC, max_grid=(6, 8))
    ranges = dimension_profiles("tensorrt", spec, 4, 20)[-1]
    assert ranges["tokens"] == ranges["T"] == (1, 16, 48)
    assert (ranges["token_rows"], ranges["W"]) == ((1, 4, 12), (1, 8, 32))
