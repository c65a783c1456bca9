"""Sessions that are broken on purpose: the stand-ins or the golden trajectory must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.compiler import Compute, Plan, Predict, in_form
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.engines.tensorrt.backend import TensorrtBackend
from goc_deploy.engines.tensorrt.selection import tensorrt_backend
from goc_deploy.protocols import Buffer, Move, Run, Stream
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.pipeline import Pipeline
from tests.reference import worst_step
from tests.stand_ins.device import StandInDevice, StandInStream
from tests.stand_ins.kernels import Fault
from tests.stand_ins.loading import CAPABILITY, copy_with_engines
from tests.stand_ins.tensorrt import StandInTensorrt

Bound = dict[str, Buffer]
Mutation = Callable[[Bound, Bound], tuple[Bound, Bound]]


class BrokenStream(StandInStream):
    """A stream whose uploads a test changes."""

    def __init__(self, device: BrokenDevice, *, graphs: bool) -> None:
        super().__init__(device, graphs=graphs)
        self._broken = device

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        changed = self._broken.change_upload(values)
        if changed is not None:
            super().upload(changed, target)


class BrokenDevice(StandInDevice):
    """A device that is asked for something else than the session asks for.

    Attributes:
        change_moves: changes the moves at the start of a step, which are those of the modulation,
            the numbers and the latents.
        change_upload: changes the values of an upload; None drops it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repair()

    def repair(self) -> None:
        self.change_moves: Callable[[list[Move]], list[Move]] = lambda moves: moves
        self.change_upload: Callable[[np.ndarray], np.ndarray | None] = lambda values: values

    def stream(self, *, graphs: bool = True) -> BrokenStream:
        return BrokenStream(self, graphs=graphs and self.graphs)

    def step_start(self, moves: Sequence[Move], step: Buffer, stream: Stream) -> Run:
        return super().step_start(self.change_moves(list(moves)), step, stream)


@dataclass(frozen=True)
class Loaded:
    """Engines on a device, for pipelines that are broken in some way."""

    manifest: Manifest
    plan: Plan
    engines: Engines
    backend: TensorrtBackend
    device: BrokenDevice

    def pipeline(self, plan: Plan | None = None, engines: Engines | None = None) -> Pipeline:
        return Pipeline(
            self.manifest, plan or self.plan, engines or self.engines, self.backend, 16, 1
        )


def load(directory: Path) -> Loaded:
    """The gradient."""
    opened, device = EngineDir.open(directory), BrokenDevice()
    tensorrt = StandInTensorrt(device)
    backend = tensorrt_backend(opened, tensorrt.library, CAPABILITY, device)
    plan = in_form(opened.plan("fora:2+gc:1.2"), opened.manifest.model, "device")
    return Loaded(opened.manifest, plan, load_engines(opened, [plan], backend), backend, device)


@pytest.fixture(scope="module")
def loaded_units(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Weights that all units of a kind share an engine for, unit by unit."""
    target = tmp_path_factory.mktemp("mutations") / "engine"
    return load(copy_with_engines(golden_engine, target, "shared", segments=False))


@pytest.fixture(scope="module")
def loaded_segments(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The same with segments."""
    target = tmp_path_factory.mktemp("merged") / "engine"
    return load(copy_with_engines(golden_engine, target, "shared"))


@pytest.fixture
def units(loaded_units: Loaded) -> Iterator[Loaded]:
    yield loaded_units
    loaded_units.device.repair()


@pytest.fixture
def merged(loaded_segments: Loaded) -> Iterator[Loaded]:
    yield loaded_segments
    loaded_segments.device.repair()


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


def with_engine(loaded: Loaded, kind: str, mutation: Mutation) -> Pipeline:
    """Rebind a unit by name, or all predict graphs, or all segments."""
    engines = loaded.engines
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
    return loaded.pipeline(engines=engines)


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
    units: Loaded, golden: dict[str, np.ndarray]
) -> None:
    assert not notices(units.pipeline(), golden)
    same = with_engine(units, "block_01_mlp", lambda inputs, outputs: (inputs, outputs))
    assert not notices(same, golden)


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("unit", [0, 5])
def test_skipping_a_history_write_is_noticed(
    units: Loaded, golden: dict[str, np.ndarray], step: int, unit: int
) -> None:
    plan = with_launch(units.plan, step, unit, lambda op: Compute(op.unit, (None,)))
    found = notices(units.pipeline(plan), golden)
    assert found == "trajectory" if step else "which nobody wrote" in found


@pytest.mark.parametrize("step", [3, 7])
def test_swapping_the_entries_of_a_history_is_noticed(
    units: Loaded, golden: dict[str, np.ndarray], step: int
) -> None:
    def change(op: Predict) -> Predict:
        first = op.predictions[0]
        return replace(
            op, predictions=(replace(first, slots=first.slots[::-1]), *op.predictions[1:])
        )

    assert len(units.plan.launches[step][0].predictions[0].slots) == 2
    assert notices(units.pipeline(with_launch(units.plan, step, 0, change)), golden)


def test_reading_the_slot_of_another_unit_is_noticed(
    units: Loaded, golden: dict[str, np.ndarray]
) -> None:
    def change(op: Predict) -> Predict:
        first, second, *others = op.predictions
        exchanged = (replace(first, slots=second.slots), replace(second, slots=first.slots))
        return replace(op, predictions=(*exchanged, *others))

    found = notices(units.pipeline(with_launch(units.plan, 5, 0, change)), golden)
    assert found == "trajectory" or "to the same memory" in found or "over" in found


def test_writing_two_predictions_to_one_slot_is_noticed(
    units: Loaded, golden: dict[str, np.ndarray]
) -> None:
    def change(op: Predict) -> Predict:
        first, second, *others = op.predictions
        return replace(op, predictions=(first, replace(second, store=first.store), *others))

    assert "to the same memory" in notices(
        units.pipeline(with_launch(units.plan, 3, 0, change)), golden
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
        ("predict", in_place("x_out", "x"), "trajectory"),  # allowed, but x is read afterwards
        (
            "sampler",
            in_place("latents_out", "latents"),
            "writes latents_out over latents, which it reads",
        ),
    ],
)
def test_wrong_bindings_are_noticed(
    units: Loaded, golden: dict[str, np.ndarray], kind: str, mutation: Mutation, complaint: str
) -> None:
    assert complaint in notices(with_engine(units, kind, mutation), golden)


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
    merged: Loaded, golden: dict[str, np.ndarray], mutation: Mutation, complaint: str
) -> None:
    assert not notices(merged.pipeline(), golden)
    assert complaint in notices(with_engine(merged, "segments", mutation), golden)


MODULATION, NUMBERS, LATENTS = range(3)  # the moves at the start of a step of this plan


@pytest.mark.parametrize(
    ("index", "change", "complaint"),
    [
        (LATENTS, None, "which nobody wrote"),  # the latents of the step before stay away
        (NUMBERS, lambda move: replace(move, stride=0), "trajectory"),
        (NUMBERS, None, "which nobody wrote"),
        (MODULATION, lambda move: replace(move, period=1), "trajectory"),
        (MODULATION, lambda move: replace(move, stride=move.stride // 2), "trajectory"),
    ],
)
def test_a_step_that_moves_the_wrong_values_is_noticed(
    merged: Loaded,
    golden: dict[str, np.ndarray],
    index: int,
    change: Callable[[Move], Move] | None,
    complaint: str,
) -> None:
    def change_moves(moves: list[Move]) -> list[Move]:
        assert len(moves) == 3
        changed = [] if change is None else [change(moves[index])]
        return [*moves[:index], *changed, *moves[index + 1 :]]

    merged.device.change_moves = change_moves
    assert complaint in notices(merged.pipeline(), golden)


@pytest.mark.parametrize("start", [0, -2])
def test_counting_steps_from_elsewhere_is_noticed(
    merged: Loaded, golden: dict[str, np.ndarray], start: int
) -> None:
    counted: list[int] = []

    def change_upload(values: np.ndarray) -> np.ndarray:
        if values.dtype != np.int32 or values.tolist() != [-1]:
            return values
        counted.append(start)
        return np.array([start], np.int32)

    merged.device.change_upload = change_upload
    assert notices(merged.pipeline(), golden)
    assert counted


def test_running_on_inputs_that_were_not_uploaded_is_noticed(
    units: Loaded, golden: dict[str, np.ndarray]
) -> None:
    pipe = units.pipeline()
    units.device.change_upload = lambda _: None
    assert "which nobody wrote" in notices(pipe, golden)
