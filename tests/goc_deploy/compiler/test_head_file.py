"""The file of a head's weights, and the head in the file of its plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from goc_deploy.compiler import Plan, check_plan, compile_schedule
from goc_deploy.compiler.head_file import head_to_safetensors, weights_from_safetensors
from goc_deploy.compiler.plan_file import plan_from_json, plan_to_json
from goc_deploy.errors import EngineDirError
from goc_deploy.samplers.head import Head
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.heads import FORMS, head_of, plan_with_head

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, True)
SCHEDULE = Schedule(2, ("attn", "mlp"), (((),) * 4, ((1.0,),) * 4) * 2)
PLAN = compile_schedule(SCHEDULE, SPEC, "ddim")


def fields(form: str = "hidden3-2") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan_to_json(plan_with_head(PLAN, FORMS[form], SPEC)))
    return found


def read(found: Any, weights: np.ndarray | None) -> Plan:
    return plan_from_json(json.dumps(found).encode(), SCHEDULE, "p.json", weights)


def weights_of(form: str = "hidden3-2") -> np.ndarray:
    return weights_from_safetensors(head_to_safetensors(head_of(FORMS[form], SPEC, 4)), "w")


@pytest.mark.parametrize("form", FORMS)
def test_saving_and_loading_a_plan_with_its_head_is_the_identity(form: str) -> None:
    plan = plan_with_head(PLAN, FORMS[form], SPEC)
    assert plan.sampler.head is not None
    content = head_to_safetensors(plan.sampler.head)
    loaded = read(json.loads(plan_to_json(plan)), weights_from_safetensors(content, "w"))
    assert loaded == plan
    check_plan(loaded, SPEC)
    assert loaded.sampler.graph == f"sampler+{form}"


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "features": (
        lambda h: h.update(features="pixels"),
        "$.sampler.head.features: invalid enum value 'pixels'",
    ),
    "outputs": (
        lambda h: h.update(outputs=-1),
        "$.sampler.head.outputs: expected int >= 0, got -1",
    ),
    "many": (
        lambda h: h.update(tokens=10**6),
        "$.sampler.head.tokens: expected int <= 8, got 1000000",
    ),
    "missing": (lambda h: h.pop("scaled"), "$.sampler.head.scaled: required field is missing"),
    "unknown": (
        lambda h: h.update(weights="AAAA"),
        "$.sampler.head: object contains unknown field weights",
    ),
    "tokens of patches": (
        lambda h: h.update(features="patch"),
        "$.sampler.head.tokens: expected 0 for patch, got 2",
    ),
    "scales": (
        lambda h: h.update(cfg_scales=[4.0, 1.0]),
        "$.sampler.head.cfg_scales: expected a range, got [4.0, 1.0]",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_field_is_named_with_its_path(change: str) -> None:
    alter, message = CHANGES[change]
    found = fields()
    alter(found["sampler"]["head"])
    with pytest.raises(EngineDirError) as caught:
        read(found, weights_of())
    assert str(caught.value).startswith(f"p.json: {message}")


def test_a_head_and_its_weights_go_together() -> None:
    with pytest.raises(EngineDirError, match="lists no weights of this head"):
        read(fields(), None)
    without = fields()
    without["sampler"]["head"] = None
    with pytest.raises(EngineDirError, match="lists weights of a head, but there is none"):
        read(without, weights_of())
    del without["sampler"]["head"]
    assert read(without, None) == replace(PLAN, name=without["name"])


@pytest.mark.parametrize("axis", range(3))
def test_weights_of_another_shape_are_refused(axis: int) -> None:
    plan = read(fields(), weights_of().repeat(2, axis))
    shape = re.escape(str([4, 193, 16]))
    with pytest.raises(EngineDirError, match=rf"hidden3-2 needs {shape}"):
        check_plan(plan, SPEC)


def test_weights_that_are_shorter_than_their_shape_are_refused() -> None:
    head = head_of(FORMS["patch3"], SPEC, 4)
    short = Head(head.form, head.cfg_scales, head.shape, head.weights[:-4])
    with pytest.raises(EngineDirError, match="the weights of its head"):
        check_plan(replace(PLAN, sampler=replace(PLAN.sampler, head=short)), SPEC)


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "w is not a sound safetensors file"),
    "cut": (head_to_safetensors(head_of(FORMS["patch3"], SPEC, 4))[:-1], "is not a sound"),
    "another name": (save({"w": np.zeros((1, 2, 3), np.float32)}), "tensor 'weights', got w"),
    "no tensor": (save({}), "tensor 'weights', got none"),
    "two tensors": (
        save({"weights": np.zeros((1, 2, 3), np.float32), "w": np.zeros(1, np.float32)}),
        "expected one tensor 'weights', got w, weights",
    ),
    "dtype": (save({"weights": np.zeros((1, 2, 3), np.float16)}), "float32 of 3 dimensions, got"),
    "shape": (save({"weights": np.zeros((6,), np.float32)}), r"got float32 \[6\]"),
    "not finite": (
        save({"weights": np.float32([[[0.0]], [[np.inf]]])}),
        r"w: weights\[1\]: a value is not finite",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(kind: str) -> None:
    content, message = WRONG[kind]
    with pytest.raises(EngineDirError, match=message):
        weights_from_safetensors(memoryview(content), "w")
