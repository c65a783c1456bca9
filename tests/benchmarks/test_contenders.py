from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import ETA, l2c_like_schedule
from benchmarks.eager import EagerDiT
from benchmarks.make_checkpoint import random_state
from benchmarks.monolithic import MonolithicGraph, write_graph
from benchmarks.work import Work, sampled
from goc_deploy.compiler import compile_schedule
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule.operations import full_step_flops
from goc_deploy.spec import ModelSpec
from tests.reference import eager_trajectory, relative_l2

SPEC = ModelSpec(3, 64, 4, 256, 2, 4, 4, 1000, True)
STEPS = 6


@pytest.fixture(scope="module")
def model() -> DiT:
    model = DiT(SPEC).eval().requires_grad_(False)
    model.load_state_dict(random_state(SPEC, 0))
    return model


@pytest.fixture(scope="module")
def work() -> Work:
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    return Work(noise, (1, 207), SPEC.choices, 4.0, sampler_table("ddim", STEPS, Process("eps")))


@pytest.mark.parametrize(
    ("policy", "reused", "eta"),
    [("none", (), None), ("fora:2", (1, 3, 5), None), (f"fora:2+gc:{ETA}", (1, 3, 5), ETA)],
)
def test_the_plain_reference_does_what_the_policy_says(
    model: DiT, work: Work, policy: str, reused: tuple[int, ...], eta: float | None
) -> None:
    found = sampled(EagerDiT(model, frozenset(reused), eta), work)
    schedule = schedule_from_policy(parse_policy(policy), SPEC, STEPS)
    expected = eager_trajectory(
        model, schedule, work.table, work.noise[:, None], [1, 207], 4.0, SPEC.channels
    )
    assert relative_l2(found.latents, expected[-1]) < 1e-5
    assert len(found.step_ms) == STEPS
    assert found.total_ms >= sum(found.step_ms)


@pytest.mark.filterwarnings("ignore")  # of torch.onnx about itself
def test_the_single_graph_computes_the_same(model: DiT, work: Work, tmp_path: Path) -> None:
    write_graph(model, tmp_path / "model.onnx")
    found = MonolithicGraph(tmp_path / "model.onnx", 0).run(work)
    assert relative_l2(found.latents, sampled(EagerDiT(model), work).latents) < 1e-5


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_diffusers_computes_the_same_on_shared_tensors(model: DiT, work: Work) -> None:
    pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    from benchmarks.diffusers_dit import run_pipeline, transformer_from_dit

    transformer = transformer_from_dit(model)
    assert transformer.transformer_blocks[1].norm1.linear.weight.data_ptr() == (
        model.blocks[1].adaLN_modulation[1].weight.data_ptr()
    )
    found = run_pipeline(transformer, work)
    assert relative_l2(found.latents, sampled(EagerDiT(model), work).latents) < 1e-5
    assert len(found.step_ms) == STEPS


def test_flops_are_those_that_pytorch_counts(model: DiT) -> None:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        EagerDiT(model)(torch.randn(2, 4, 8, 8), torch.tensor([9.0, 9.0]), torch.tensor([1, 2]), 0)
    conditioning = (
        2 * 2 * SPEC.hidden * (256 + SPEC.hidden + 6 * SPEC.depth * SPEC.hidden + 2 * SPEC.hidden)
    )
    attention = (
        2 * 2 * SPEC.depth * 2 * SPEC.tokens**2 * SPEC.hidden
    )  # PyTorch does not count its fused CPU kernel
    assert counter.get_total_flops() - conditioning + attention == full_step_flops(SPEC, 2)


def test_the_l2c_like_schedule_caches_as_many_units_as_the_public_router() -> None:
    spec = ModelSpec(28, 8, 2, 16, 2, 2, 4, 10, False)
    schedule = l2c_like_schedule(spec, 20)
    cached = [sum(bool(row) for row in step) for step in schedule.coefficients]
    assert cached == [0, 56, 0, 56, 0, 52, 0, 48, 0, 30, 0, 3, 0, 1, 0, 1, 0, 1, 0, 0]
    assert sum(cached) == 248
    assert compile_schedule(schedule, spec).kind_counts["mixed"] == 7
