from __future__ import annotations

import pytest

from benchmarks.make_checkpoint import spec_of
from goc_deploy.blocks import Unit
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule.operations import full_step_flops, product_flops, schedule_flops
from goc_deploy.spec import ModelSpec

XL = spec_of("XL/2", 256)


def flops(policy: str, steps: int, rows: int = 2) -> int:
    return schedule_flops(schedule_from_policy(parse_policy(policy), XL, steps), XL, rows)


def test_dit_xl_takes_what_papers_say() -> None:
    assert full_step_flops(XL, 1) == pytest.approx(
        2 * 118.64e9, rel=0.005
    )  # DiT, table 4: multiply-adds, with adaLN
    assert flops("none", 50) == pytest.approx(
        23.74e12, rel=0.005
    )  # FLOPs(T) of 50 steps with guidance, ToCa, table 3


def test_a_schedule_takes_its_computed_units_and_little_for_the_others() -> None:
    assert flops("none", 20) == 20 * full_step_flops(XL, 2)
    reuse, gradient = flops("fora:2", 20), flops("fora:2+gc:1.0", 20)
    assert flops("none", 10) < reuse < gradient < 1.01 * flops("none", 10)
    assert flops("fora:2", 20, rows=1) == reuse / 2


def test_cross_attention_takes_its_caption_and_no_keys_and_values() -> None:
    spec = ModelSpec(
        1, 8, 2, 16, 2, 2, 4, 0, False, branches=("attn", "cross", "mlp"), caption_tokens=5
    )
    assert product_flops(spec, Unit("cross")) == (2 * 4 * 8 * 8, 2 * 2 * 4 * 5 * 8, 2 * 4 * 8 * 8)
