"""The comparison with cache-dit: its mask, its rows, and what its contenders compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.work import Outcome
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.spec import ModelSpec

pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")

from benchmarks import beside_cache_dit
from benchmarks.peers.contenders import (
    DIFFUSERS,
    OURS,
    PLANS,
    REUSE,
    TAYLORSEER,
    PeerContender,
    cache_dit_masked,
    diffusers_uncached,
    mask_of,
)
from benchmarks.peers.dit import digits_dit
from benchmarks.peers.model import PeerModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and cache-dit about themselves
SPEC = ModelSpec(3, 64, 4, 256, 2, 4, 4, 1000, True)
STEPS = 8


def mask(policy: str) -> list[int]:
    return mask_of(schedule_from_policy(parse_policy(policy), SPEC, STEPS))


def outcome(latents: float, total_ms: float) -> Outcome:
    return Outcome(np.full(4, latents, np.float32), (total_ms,), total_ms)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeerModel:
    return digits_dit(tmp_path_factory.mktemp("peers"), 2, STEPS, PLANS)


def test_a_mask_names_the_steps_that_a_plan_computes() -> None:
    assert mask("none") == [1] * STEPS
    assert mask("fora:2") == mask("fora:2+lagrange:1") == [1, 0] * 4
    assert mask("compute:0,1,4") == [1, 1, 0, 0, 1, 0, 0, 0]


def test_rows_compare_medians_and_latents_with_the_own_run_without_cache() -> None:
    ours = PeerContender("goc_deploy fora:2", OURS, lambda _: outcome(1.1, 1.0), lambda: 0.5)
    total_ms = {DIFFUSERS: [9000.0, 4000.0], OURS: [3000.0, 5000.0], ours.name: [2000.0] * 2}
    outcomes = {OURS: outcome(1.0, 0.0), ours.name: outcome(1.1, 0.0)}
    row = beside_cache_dit.row_of(ours, 0.5, total_ms, outcomes)
    assert (row["own_ratio"], row["diffusers_ratio"]) == (2.0, 3.25)
    assert row["error"] == pytest.approx(0.1, rel=1e-5)
    uncached = PeerContender(OURS, OURS, ours.run, lambda: 1.0)
    rows = {OURS: beside_cache_dit.row_of(uncached, 1.0, total_ms, outcomes), ours.name: row}
    assert rows[OURS]["error"] is None
    assert beside_cache_dit.table_of(rows).splitlines()[2:] == [
        "| `goc_deploy none` | 100 % | 4.000 | 3.000-5.000 | 1.00 | 1.62 |  |",
        "| `goc_deploy fora:2` | 50 % | 2.000 | 2.000-2.000 | 2.00 | 3.25 | 0.1000 |",
    ]


@pytest.mark.slow
def test_every_contender_computes_the_steps_that_the_table_has(model: PeerModel) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit comes with the peers extra")
    found = beside_cache_dit.measure(model, 1)
    rows = found["contenders"]
    assert found["distance"] < 1e-5
    computed = {name: round(row["computed"], 4) for name, row in rows.items()}
    first = round((1 + 1 / model.spec.depth) / 2, 4)
    assert computed == {
        DIFFUSERS: 1.0,
        REUSE: first,
        TAYLORSEER: first,
        OURS: 1.0,
        **{f"goc_deploy {plan}": 0.5 for plan in PLANS[1:]},
    }
    errors = [row["error"] for name, row in rows.items() if name not in (DIFFUSERS, OURS)]
    assert all(1e-3 < error < 1 for error in errors)
    assert len(set(errors)) == len(errors)


def test_a_mask_of_ones_is_the_model_without_cache(model: PeerModel) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit comes with the peers extra")
    expected = diffusers_uncached(model).run(model.work)
    for taylor in (False, True):
        contender = cache_dit_masked(model, [1] * STEPS, taylor=taylor)
        for _ in range(2):  # the second run starts anew
            assert beside_cache_dit.distance(contender.run(model.work), expected) < 1e-6
        assert contender.computed() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_captions_reach_both_programs(name: str, tmp_path: Path) -> None:
    make = beside_cache_dit.MODELS[name]
    if name == "sd3":
        make = partial(make, depth=2, heads=1, pixels=32)
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    model = make(tmp_path, 2, 3, PLANS)
    expected = diffusers_uncached(model).run(model.work)
    (found, *_) = [entry.run(model.work) for entry in beside_cache_dit.goc_deploy_plans(model)]
    assert beside_cache_dit.distance(found, expected) < 1e-4
