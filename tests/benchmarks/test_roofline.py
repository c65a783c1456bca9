from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.make_checkpoint import spec_of
from goc_deploy.compiler import Plan, compile_for_device
from goc_deploy.engines.plugin.kernel import Stack
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule.operations import full_step_flops

SPEC = spec_of("XL/2", 256)
COUNTER = roofline.Counter(SPEC, 4, 2)


def plan_of(policy: str) -> Plan:
    return compile_for_device(schedule_from_policy(parse_policy(policy), SPEC, 6), SPEC, "ddim")


def test_a_full_step_computes_what_the_model_does() -> None:
    step = roofline.total(next(roofline.steps_of(plan_of("none"), COUNTER)))
    assert step.flops == pytest.approx(full_step_flops(SPEC, 4), rel=1e-6)
    assert step.nbytes > 2 * SPEC.depth * (
        4 * SPEC.hidden**2 + 2 * SPEC.hidden * SPEC.mlp_hidden
    )  # the weights


@pytest.mark.parametrize("policy", ["fora:2", "fora:2+gc:1.2"])
def test_a_collapsed_step_moves_what_the_plugin_needs(policy: str) -> None:
    (op,) = plan_of(policy).launches[3]
    stack = Stack(
        tuple(len(p.slots) for p in op.predictions),
        tuple(p.store is not None for p in op.predictions),
    )
    coefficients = 4 * sum(stack.entries)
    (work,) = COUNTER.predict(op)
    assert (
        work.nbytes == stack.bytes_needed((4, SPEC.tokens, SPEC.hidden), "float16") - coefficients
    )


def test_a_launch_takes_as_long_as_its_slower_side() -> None:
    gpu = roofline.Gpu("test", 1.0, 1.0)
    assert roofline.Work(2e12, 1e9).seconds(gpu) == 2
    assert roofline.Work(1e12, 3e9).seconds(gpu) == 3


def test_the_command_prints_a_table_for_each_number_of_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert roofline.main(["--model", "S/2", "--images", "2", "--steps", "6"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("DiT-S/2 256, fp16, 2 images with guidance, 6 steps:")
    for word in ("| full |", "collapsed, `fora:2`", "speed-up of `fora:2+gc:1.2`", "H100 SXM"):
        assert word in text


def test_the_script_runs_as_the_documentation_starts_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "benchmarks/roofline.py", "--help"],
        cwd=Path(__file__).parents[2],
        env=environment,
        check=True,
        capture_output=True,
    )
