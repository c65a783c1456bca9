"""Sessions that are broken on purpose: the stand-ins or the golden trajectory must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.compiler import Compute, Plan, Predict
from goc_deploy.protocols import Buffer
from goc_deploy.runtime import binding, session
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.shared_binding import SharedBinder
from tests.reference import worst_step
from tests.stand_ins.kernels import Fault
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline

Bound = dict[str, Buffer]
Mutation = Callable[[Bound, Bound], tuple[Bound, Bound]]


@pytest.fixture(scope="module")
def pipe(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The gradient, with weights that all units of a kind share an engine for, unit by unit."""
    target = tmp_path_factory.mktemp("mutations") / "engine"
    engine = copy_with_engines(golden_engine, target, "shared", segments=False)
    return stand_in_pipeline(engine, "fora:2+gc:1.2")[0]


@pytest.fixture(scope="module")
def merged(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The same with segments."""
    engine = copy_with_engines(
        golden_engine, tmp_path_factory.mktemp("merged") / "engine", "shared"
    )
    return stand_in_pipeline(engine, "fora:2+gc:1.2")[0]


class Rebound:
    """An engine whose tensors are bound otherwise."""

    def __init__(self, engine: Any, mutation: Mutation) -> None:
        self._engine, self._mutation, self.dtypes = engine, mutation, engine.dtypes

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], stream: Any = None
    ) -> Any:
        return self._engine.bind(*self._mutation(dict(inputs), dict(outputs)), stream)


def notices(pipe: Pipeline, golden: dict[str, np.ndarray]) -> str:
    """The complaint about a pipeline: a rule of the device, the golden trajectory, or none."""
    try:
        for _ in range(2):  # launched, then replayed
            found = pipe.generate(
                golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
            )
    except Fault as fault:
        return str(fault)
    return "trajectory" if not worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-3 else ""


def with_plan(pipe: Pipeline, plan: Plan) -> Pipeline:
    return Pipeline(pipe.manifest, plan, pipe._engines, pipe._backend, pipe.batch_size, 1)


def with_engine(pipe: Pipeline, kind: str, mutation: Mutation) -> Pipeline:
    """Rebind a unit by name, or all predict graphs, or all segments."""
    engines = pipe._engines
    if kind in ("predict", "segments"):
        rebound = {
            signature: Rebound(engine, mutation)
            for signature, engine in getattr(engines, kind).items()
        }
        engines = replace(engines, **{kind: rebound})
    else:
        engines = replace(
            engines, units={**engines.units, kind: Rebound(engines.units[kind], mutation)}
        )
    return Pipeline(pipe.manifest, pipe.plan, engines, pipe._backend, pipe.batch_size, 1)


def with_launch(plan: Plan, step: int, index: int, change: Callable[[Any], Any]) -> Plan:
    steps = [list(launches) for launches in plan.launches]
    steps[step][index] = change(steps[step][index])
    return replace(plan, launches=tuple(tuple(launches) for launches in steps))


def swapped(first: str, second: str) -> Mutation:
    def mutation(inputs: Bound, outputs: Bound) -> tuple[Bound, Bound]:
        inputs[first], inputs[second] = inputs[second], inputs[first]
        return inputs, outputs

    return mutation


def in_place(output: str, source: str) -> Mutation:
    return lambda inputs, outputs: (inputs, {**outputs, output: inputs[source]})


def test_what_is_not_broken_is_not_complained_about(
    pipe: Pipeline, golden: dict[str, np.ndarray]
) -> None:
    assert not notices(with_plan(pipe, pipe.plan), golden)
    same = with_engine(pipe, "block_01_mlp", lambda inputs, outputs: (inputs, outputs))
    assert not notices(same, golden)


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("unit", [0, 5])
def test_skipping_a_history_write_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray], step: int, unit: int
) -> None:
    plan = with_launch(pipe.plan, step, unit, lambda op: Compute(op.unit, None))
    found = notices(with_plan(pipe, plan), golden)
    assert found == "trajectory" if step else "which nobody wrote" in found


@pytest.mark.parametrize("step", [3, 7])
def test_swapping_the_entries_of_a_history_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray], step: int
) -> None:
    def change(op: Predict) -> Predict:
        first = op.predictions[0]
        return replace(
            op, predictions=(replace(first, slots=first.slots[::-1]), *op.predictions[1:])
        )

    assert len(pipe.plan.launches[step][0].predictions[0].slots) == 2
    assert notices(with_plan(pipe, with_launch(pipe.plan, step, 0, change)), golden)


def test_reading_the_slot_of_another_unit_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray]
) -> None:
    def change(op: Predict) -> Predict:
        first, second, *others = op.predictions
        exchanged = (replace(first, slots=second.slots), replace(second, slots=first.slots))
        return replace(op, predictions=(*exchanged, *others))

    found = notices(with_plan(pipe, with_launch(pipe.plan, 5, 0, change)), golden)
    assert found == "trajectory" or "to the same memory" in found or "over" in found


def test_writing_two_predictions_to_one_slot_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray]
) -> None:
    def change(op: Predict) -> Predict:
        first, second, *others = op.predictions
        return replace(op, predictions=(first, replace(second, store=first.store), *others))

    assert "to the same memory" in notices(
        with_plan(pipe, with_launch(pipe.plan, 3, 0, change)), golden
    )


@pytest.mark.parametrize(
    ("kind", "mutation", "complaint"),
    [
        ("block_01_attn", swapped("shift", "scale"), "trajectory"),
        ("block_02_mlp", swapped("gate", "shift"), "trajectory"),
        ("final", swapped("shift", "scale"), "trajectory"),
        ("predict", swapped("g0_0", "g1_0"), "trajectory"),
        ("sampler", swapped("cond_rows", "uncond_rows"), "trajectory"),
        ("block_00_attn", in_place("x_out", "x"), "writes x_out over x, which it reads"),
        (
            "sampler",
            in_place("latents_out", "latents"),
            "writes latents_out over latents, which it reads",
        ),
    ],
)
def test_wrong_bindings_are_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray], kind: str, mutation: Mutation, complaint: str
) -> None:
    assert complaint in notices(with_engine(pipe, kind, mutation), golden)


def without(output: str) -> Mutation:
    return lambda inputs, outputs: (
        inputs,
        {name: buffer for name, buffer in outputs.items() if name != output},
    )


@pytest.mark.parametrize(
    ("mutation", "complaint"),
    [
        (without("block_02_mlp.feature"), "which nobody wrote"),
        (swapped("block_01_attn.shift", "block_01_attn.scale"), "trajectory"),
        (swapped("block_00_mlp.gate", "block_03_mlp.gate"), "trajectory"),
        (in_place("x_out", "x"), "writes x_out over x, which it reads"),
    ],
)
def test_a_segment_that_forgets_a_feature_or_is_bound_wrong_is_noticed(
    merged: Pipeline, golden: dict[str, np.ndarray], mutation: Mutation, complaint: str
) -> None:
    assert not notices(with_plan(merged, merged.plan), golden)
    assert complaint in notices(with_engine(merged, "segments", mutation), golden)


def test_forgetting_to_alternate_between_token_buffers_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = binding.Binder._update
    monkeypatch.setattr(
        binding.Binder, "_update", lambda self, op, x, _spare, row: update(self, op, x, x, row)
    )
    with pytest.raises(Fault, match="writes x_out over x"):
        with_plan(pipe, pipe.plan).generate(golden["labels"])


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (
            "_left",
            lambda moves: moves[1:],
            "which nobody wrote",
        ),  # the latents of the step before stay away
        ("_numbers", lambda moves: [replace(moves[0], stride=0), *moves[1:]], "trajectory"),
        ("_numbers", lambda moves: moves[1:], "which nobody wrote"),
        ("_modulation_of", lambda move: replace(move, period=1), "trajectory"),
        ("_modulation_of", lambda move: replace(move, stride=move.stride // 2), "trajectory"),
    ],
)
def test_a_step_that_moves_the_wrong_values_is_noticed(
    merged: Pipeline,
    golden: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Any], Any],
    complaint: str,
) -> None:
    right = getattr(SharedBinder, name)
    monkeypatch.setattr(SharedBinder, name, lambda self, *args: change(right(self, *args)))
    assert complaint in notices(with_plan(merged, merged.plan), golden)


@pytest.mark.parametrize("start", [0, -2])
def test_counting_steps_from_elsewhere_is_noticed(
    merged: Pipeline, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    monkeypatch.setattr(session, "BEFORE_THE_FIRST_STEP", np.array([start], np.int32))
    assert notices(with_plan(merged, merged.plan), golden)


def test_running_on_inputs_that_were_not_uploaded_is_noticed(
    pipe: Pipeline, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Session, "_upload", lambda *_: None)
    assert "which nobody wrote" in notices(with_plan(pipe, pipe.plan), golden)
