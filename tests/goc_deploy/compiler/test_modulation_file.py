"""The file of a modulation table, and what tables are shared by."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load

from goc_deploy.compiler import compile_schedule
from goc_deploy.compiler.modulation_file import (
    steps_by_graph,
    table_from_safetensors,
    table_key,
    table_to_safetensors,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.protocols import NUMPY_DTYPES, bfloat16_from_float32
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False, prediction_type="flow_to_noise")
SHAPE = (3, 5, 8)
VALUES = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
COMPUTED, HALF = ((COMPUTE,) * 4,) * 4, ((COMPUTE,) * 4, (REUSE,) * 4) * 2


def table_of(dtype: str) -> np.ndarray:
    return (
        bfloat16_from_float32(VALUES) if dtype == "bfloat16" else VALUES.astype(NUMPY_DTYPES[dtype])
    )


def read(content: bytes, dtype: str = "float32") -> np.ndarray:
    return table_from_safetensors(memoryview(content), SHAPE, dtype, "t")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_writing_and_reading_a_table_is_the_identity(dtype: str) -> None:
    table = table_of(dtype)
    found = read(table_to_safetensors(table, dtype), dtype)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, table)


def test_the_package_safetensors_reads_the_file() -> None:
    (name, found), *others = load(table_to_safetensors(VALUES, "float32")).items()
    assert (name, others) == ("table", [])
    np.testing.assert_array_equal(found, VALUES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(dtype: str, value: float) -> None:
    table = table_of(dtype)
    table[2, 1, 7:] = bfloat16_from_float32(np.array([value])) if dtype == "bfloat16" else value
    with pytest.raises(EngineDirError, match=r"t: table\[2\]: a value is not finite; export again"):
        read(table_to_safetensors(table, dtype), dtype)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        table_to_safetensors(VALUES, "float32")[:-1],
        table_to_safetensors(VALUES, "float32") + b"\0",
        table_to_safetensors(VALUES[:2], "float32"),
        table_to_safetensors(VALUES.reshape(5, 3, 8), "float32"),
        table_to_safetensors(table_of("float16"), "float16"),
    ],
)
def test_another_file_is_refused(content: bytes) -> None:
    expected = "t: expected one tensor 'table', float32 [3, 5, 8], got a file of "
    with pytest.raises(EngineDirError, match=re.escape(f"{expected}{len(content)} bytes")):
        read(content)


def test_plans_share_a_table_if_all_that_it_depends_on_is_equal() -> None:
    process = Process("flow_to_noise")
    tables = [sampler_table(name, 4, process) for name in ("euler", "euler@shift=3")]
    plan = compile_schedule(Schedule.of(SPEC, COMPUTED), SPEC, tables[0])
    assert table_key(compile_schedule(Schedule.of(SPEC, HALF), SPEC, tables[0])) == table_key(plan)
    shifted = compile_schedule(Schedule.of(SPEC, COMPUTED), SPEC, tables[1])
    switched = [
        replace(plan, schedule=replace(plan.schedule, switch=switch)) for switch in (0, 1, 2)
    ]
    assert len({table_key(other) for other in (plan, shifted, *switched)}) == 5
    assert steps_by_graph(plan) == {"conditioning": range(4)}
    assert [dict(steps_by_graph(other)) for other in switched] == [
        {"second_conditioning": range(4)},
        {"conditioning": range(1), "second_conditioning": range(1, 4)},
        {"conditioning": range(2), "second_conditioning": range(2, 4)},
    ]
