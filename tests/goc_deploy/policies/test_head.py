"""The part ``+head`` of a SPEC."""

from __future__ import annotations

from dataclasses import replace

import pytest

from goc_deploy.errors import UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.head import (
    HeadOptions,
    default_head_images,
    with_images,
    without_predicted_steps,
)
from goc_deploy.policies.resolve import head_from_policy, schedule_from_policy
from goc_deploy.samplers.head import HeadForm
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 32, 2, 64, 2, 4, 4, 10, False)
XL = ModelSpec(28, 1152, 16, 4608, 2, 16, 4, 1000, True)


def schedule(text: str) -> Schedule:
    policy = parse_policy(text)
    head_from_policy(policy)
    return schedule_from_policy(policy, SPEC, 6)


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("fora:2", None),
        ("fora:2+head", HeadOptions()),
        ("none+head:patch", HeadOptions("patch")),
        ("fora:2+lagrange:2+head:hidden,images=64", HeadOptions("hidden", images=64)),
        ("fora:2+head:squares", HeadOptions("squares")),
        ("fora:2+head:scalar,target=converged", HeadOptions("scalar", target="converged")),
        ("fora:2+head,skip_predicted", HeadOptions(skip_predicted=True)),
        ("none+head,scaled,scales=1.5..6", HeadOptions(scaled=True, scales=(1.5, 6.0))),
        ("file:a+b/c.json+gc:1.2+head:patch", HeadOptions("patch")),
    ],
)
def test_a_head_comes_after_base_and_correction(text: str, head: HeadOptions | None) -> None:
    assert head_from_policy(parse_policy(text)) == head


def test_a_head_changes_neither_the_schedule_nor_the_names_of_other_parts() -> None:
    plain, headed = schedule("fora:2+lagrange:2"), schedule("fora:2+lagrange:2+head:patch,images=8")
    assert headed == replace(plain, policy="fora:2+lagrange:2+head:patch,images=8")
    policy = parse_policy("file:folder/a.json+lagrange:2+head:patch")
    assert policy.recorded == "file:a.json+lagrange:2+head:patch"
    assert policy.default_name == "file-a+lagrange-2+head-patch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fora:2+head:pixels",
            "features must be scalar or patch or hidden or squares, got 'pixels'",
        ),
        ("fora:2+head,images=7", "option images must be a whole number within 8..100000"),
        ("fora:2+head,scales=4", "option scales must be LO..HI, each a number within 0..100"),
        ("fora:2+head,scales=4..2", "LO below HI, got '4..2'"),
        ("fora:2+head,scaled", "add scales=LO..HI"),
        ("fora:2+head,target=best", "target must be uncached or converged"),
        ("fora:2+head+lagrange:2", "too many parts"),
        ("fora:2+head+head", "unknown correction 'head'"),
        ("fora:2+hed", r"did you mean \+head"),
        ("head:patch", "so it comes last, such as"),
        ("fora:2,images=64", "option 'images' is not one of"),
        ("fora:2+gc,skip_predicted", "option 'skip_predicted' is not one of"),
    ],
)
def test_a_wrong_head_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        schedule(text)


def test_predicted_steps_are_left_out() -> None:
    kept = without_predicted_steps(schedule("fora:2+lagrange:2+head,skip_predicted"))
    assert kept.coefficients == ((COMPUTE,) * SPEC.units,) * 3
    mixed = schedule("fora:2")
    rows = [list(step) for step in mixed.coefficients]
    rows[3][1] = COMPUTE
    mixed = replace(mixed, coefficients=tuple(map(tuple, rows)))
    with pytest.raises(UsageError, match="step 3 predicts some"):
        without_predicted_steps(mixed)


def test_the_number_of_images_is_that_of_the_option_then_of_the_calibration() -> None:
    assert with_images(HeadOptions(images=64), 32, SPEC, 20).images == 64
    assert with_images(HeadOptions(), 32, SPEC, 20).images == 32
    assert with_images(HeadOptions(), None, SPEC, 20).images == 512
    assert default_head_images(XL, 20) == 16
    with pytest.raises(UsageError, match="at least 8 calibration images, got 4"):
        with_images(HeadOptions(), 4, SPEC, 20)


def test_tokens_of_two_and_outputs_of_three_earlier_computed_steps_are_read() -> None:
    assert HeadOptions().form == HeadForm("hidden", 3, 2)
    assert HeadOptions("squares").form == HeadForm("squares", 3, 2)
    assert HeadOptions("patch").form == HeadForm("patch", 3)
