"""Modulation tables that are evaluated for a plan: values, parts, and when there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from goc_deploy.api.engines import cpu_backend
from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.compiler.modulation_file import table_from_safetensors, table_key
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest, Parameter
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError
from goc_deploy.exporters.graphs import modulation
from goc_deploy.exporters.graphs.modulation import write_table
from goc_deploy.precision import DTYPE_OF_PRECISION, Precision
from goc_deploy.protocols import (
    Backend,
    Buffer,
    Engine,
    Run,
    float32_from_bfloat16,
    stored_values,
)
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import SECOND_SET
from tests.pixart_reference import SPEC as PIXART

SPEC = replace(PIXART, told_size=0)
ROWS, HIDDEN, STEPS = SPEC.modulation.count, SPEC.hidden, 5
TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
SHAPES = {"w1": (HIDDEN, 2), "b1": (HIDDEN,), "w2": (ROWS * HIDDEN, HIDDEN), "b2": (ROWS * HIDDEN,)}


def graph(precision: Precision, *more: str) -> bytes:
    """Two layers with a sigmoid; the second is the large one."""
    kind = TYPES[precision]
    weights = ", ".join(
        f"{kind}[{','.join(map(str, shape))}] {name}" for name, shape in SHAPES.items()
    )
    inputs = ", ".join(("float[S] timesteps", *more, weights))
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        conditioning ({inputs}) => ({kind}[S,{ROWS},1,{HIDDEN}] table)
        <float[2] speeds = {{0.001, 0.01}}, int64[1] last = {{1}},
         int64[4] shape = {{-1, {ROWS}, 1, {HIDDEN}}},
         float[S,1] told, float[S,2] angles, float[S,2] waves, {kind}[S,2] small,
         {kind}[S,{HIDDEN}] first, {kind}[S,{HIDDEN}] active, {kind}[S,{ROWS * HIDDEN}] second>
        {{
            told = Unsqueeze(timesteps, last)
            angles = Mul(told, speeds)
            waves = Cos(angles)
            small = Cast<to={onnx.TensorProto.DataType.Value(kind.upper())}>(waves)
            first = Gemm<transB=1>(small, w1, b1)
            active = Sigmoid(first)
            second = Gemm<transB=1>(active, w2, b2)
            table = Reshape(second, shape)
        }}
    """
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def weights_of(seed: int, dtype: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return {
        name: stored_values(0.3 * draw(shape).astype(np.float32), dtype)
        for name, shape in SHAPES.items()
    }


class ListsInputs(OrtBackend):
    """ONNX Runtime, which lists the inputs of everything that it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[list[tuple[str, Buffer]]] = []

    def load(self, *args: Any, **more: Any) -> Engine:  # type: ignore[override]
        engine = super().load(*args, **more)
        bind = engine.bind

        def listed(inputs: Mapping[str, Buffer], *rest: Any) -> Run:
            self.inputs.append(list(inputs.items()))
            return bind(inputs, *rest)

        engine.bind = listed  # type: ignore[method-assign]
        return engine


class Directory:
    """The files of a model, and its manifest."""

    def __init__(self, precision: Precision = "fp32", *inputs: str, sets: int = 1) -> None:
        dtype = DTYPE_OF_PRECISION[precision]
        self.files: dict[str, bytes] = {}
        units = []
        for seed in range(sets):
            name = SECOND_SET * seed + "conditioning"
            content, parameters = b"", []
            for parameter, values in weights_of(seed, dtype).items():
                parameters.append(Parameter(parameter, len(content), values.shape))
                content += values.tobytes()
            self.files |= {f"{name}.onnx": graph(precision, *inputs), f"{name}.weights": content}
            paths = (f"{name}.onnx", f"{name}.weights")
            units.append(GraphEntry(name, *paths, tuple(parameters), True, 0.0, precision))
        self.manifest = Manifest(SPEC, precision, 1, tuple(units), {}, (), (), {})
        self.seen: list[str] = []

    def read(self, path: str) -> memoryview:
        self.seen.append(path)
        if path not in self.files:
            raise EngineDirError(f"{path} is missing; export again")
        return memoryview(self.files[path])

    def table(
        self, folder: Path, plan: Plan, make_backend: Callable[[], Backend] = cpu_backend
    ) -> np.ndarray:
        """The table that is written for a plan."""
        (folder / "plans").mkdir(exist_ok=True)
        manifest = write_table(folder, plan, self.manifest, self.read, make_backend)
        content = memoryview((folder / manifest.tables[table_key(plan)]).read_bytes())
        dtype = DTYPE_OF_PRECISION[manifest.precision]
        return table_from_safetensors(content, (plan.steps, ROWS, HIDDEN), dtype, "")


def plan_of(steps: int = STEPS) -> Plan:
    schedule = Schedule.of(SPEC, ((COMPUTE,) * SPEC.units,) * steps)
    return compile_schedule(schedule, SPEC, "ddim", name="all")


def by_numpy(weights: Mapping[str, np.ndarray], timesteps: tuple[float, ...]) -> np.ndarray:
    """The table of weights in float64."""
    wide = {name: values.astype(np.float64) for name, values in weights.items()}
    waves = np.cos(np.array(timesteps)[:, None] * [0.001, 0.01])
    active = 1 / (1 + np.exp(-(waves @ wide["w1"].T + wide["b1"])))
    return (active @ wide["w2"].T + wide["b2"]).reshape(len(timesteps), ROWS, HIDDEN)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_table_is_that_of_the_weights(tmp_path: Path, precision: Precision) -> None:
    plan, dtype = plan_of(), DTYPE_OF_PRECISION[precision]
    found, weights = Directory(precision).table(tmp_path, plan), weights_of(0, dtype)
    if precision == "bf16":
        found = float32_from_bfloat16(found)
        weights = {name: float32_from_bfloat16(values) for name, values in weights.items()}
    exact = by_numpy(weights, plan.sampler.timesteps)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert error < {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2**-8}[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_parts_of_the_large_weight_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """The largest piece of a weight that is in memory is the part, also of bf16."""
    whole = Directory(precision).table(tmp_path, plan_of())
    part = 4 * HIDDEN * HIDDEN * 3 + 100
    monkeypatch.setattr(modulation, "PART_BYTES", part)
    backend = ListsInputs()
    found = Directory(precision).table(tmp_path, plan_of(), lambda: backend)
    np.testing.assert_array_equal(found, whole)
    pieces = [buffer.nbytes for inputs in backend.inputs for name, buffer in inputs if name in "bc"]
    assert max(pieces) <= part
    assert len(pieces) > 2 * ROWS * HIDDEN // (3 * HIDDEN + 1)  # weight and bias of each part


def test_the_steps_of_a_second_set_of_weights_are_its_own(tmp_path: Path) -> None:
    plan = plan_of()
    switched = replace(plan, schedule=replace(plan.schedule, switch=2))
    found = Directory(sets=2).table(tmp_path, switched)
    for seed, steps in ((0, slice(0, 2)), (1, slice(2, STEPS))):
        exact = by_numpy(weights_of(seed, "float32"), plan.sampler.timesteps[steps])
        assert np.abs(found[steps] - exact).max() / np.abs(exact).max() < 1e-6


def test_a_table_that_is_there_is_not_evaluated_again(tmp_path: Path) -> None:
    directory = Directory()
    directory.manifest = replace(directory.manifest, tables={table_key(plan_of()): "plans/t"})
    after = write_table(tmp_path, plan_of(), directory.manifest, directory.read, cpu_backend)
    assert after == directory.manifest
    assert not directory.seen


def test_a_table_that_is_not_smaller_than_the_weights_is_not_written(tmp_path: Path) -> None:
    directory = Directory()
    (tmp_path / "plans").mkdir()
    plan = plan_of(HIDDEN + 2)  # the weights have HIDDEN + 1 values for a value of the table
    after = write_table(tmp_path, plan, directory.manifest, directory.read, cpu_backend)
    assert not after.tables
    plan = plan_of(HIDDEN)
    assert write_table(tmp_path, plan, directory.manifest, directory.read, cpu_backend).tables


def test_a_table_above_the_budget_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory()
    monkeypatch.setattr(modulation, "TABLE_BUDGET_BYTES", 4 * STEPS * ROWS * HIDDEN - 1)
    args = (directory.manifest, directory.read, cpu_backend)
    assert not write_table(tmp_path, plan_of(), *args).tables


@pytest.mark.parametrize("other", ["int64[R] labels", "float[1] guidance", "float[2] told_size"])
def test_modulation_that_reads_more_than_timesteps_has_no_table(tmp_path: Path, other: str) -> None:
    directory = Directory("fp32", other)
    args = (directory.manifest, directory.read, cpu_backend)
    assert not write_table(tmp_path, plan_of(), *args).tables


def test_a_class_conditional_model_has_no_table(golden_engine: Path) -> None:
    assert not read_manifest(golden_engine).tables


@pytest.mark.parametrize("missing", ["conditioning.onnx", "conditioning.weights"])
def test_a_missing_graph_is_named_with_the_plan_that_needs_it(tmp_path: Path, missing: str) -> None:
    directory = Directory()
    del directory.files[missing]
    with pytest.raises(
        EngineDirError,
        match=f"plan all needs the modulation of its timesteps, .* {missing} is missing; export",
    ):
        directory.table(tmp_path, plan_of())
