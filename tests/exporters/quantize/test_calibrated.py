"""Calibrating units of an engine directory: what is seen of their products, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.weights import mapped_weights
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError, ModelError, UsageError, VerificationError
from goc_deploy.exporters.quantize.calibrated import Quantizer, kind_of
from goc_deploy.exporters.quantize.products import Product
from goc_deploy.exporters.quantize.selection import check_calibrated
from goc_deploy.exporters.quantize.statistics import (
    GOLDEN_RATIO,
    SAMPLED,
    SUMMARY,
    observing_graph,
    output_of,
)
from goc_deploy.options import no_progress
from goc_deploy.policies.calibration import MoreOutputs, Observation
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule

NAME = "block_01_mlp"


@dataclass(frozen=True, slots=True)
class Shows:
    """A laboratory in which the inputs of all products have one value."""

    value: float

    def observe(
        self,
        schedule: Schedule,  # noqa: ARG002
        table: SamplerTable,  # noqa: ARG002
        more: MoreOutputs,
        see: Callable[[Observation], None],
    ) -> None:
        """Show one run of every unit."""
        for unit, outputs in more.items():
            arrays = {n: np.full(s, self.value, np.float32) for n, s in outputs.items()}
            see(Observation(unit, 3, {}, {}, arrays))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.nan, VerificationError, r"mlp.fc1.weight has infinite values or NaN in step 3 of plan"),
        (0.0, ModelError, rf"mlp.fc1.weight cannot be.*all values.*quantize_exclude={NAME}"),
    ],
)
def test_what_has_no_range_is_named(
    value: float, error: type[Exception], message: str, golden_engine: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(golden_engine, stage)
    directory = EngineDir.open(stage)
    quantizer = Quantizer(stage, directory.manifest, [NAME], ["int8"], OrtBackend(), no_progress)
    plan = directory.plan(directory.manifest.plans[0].name)
    with pytest.raises(error, match=rf"unit {NAME}: the input of {message}"):
        quantizer.quantize([plan], lambda _: Shows(value))
    assert not (stage / "observing").exists()


def shown(values: np.ndarray) -> np.ndarray:
    """What the graph of ``y = x @ w`` shows of x (n, t, 4) float32."""
    x, y = (helper.make_tensor_value_info(name, 1, ["n", "t", 4]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    product = Product("y", "w", False, (4, 4))
    seeing = observing_graph(model, [product])
    onnx.checker.check_model(seeing, full_check=True)
    assert len(model.graph.output) == 1
    assert seeing.graph.output[1].type.tensor_type.elem_type == TensorProto.FLOAT
    backend = OrtBackend()
    engine = backend.load(memoryview(seeing.SerializeToString()), {})
    source = backend.allocate(values.shape, "float32")
    backend.upload(values, source)
    found = backend.allocate((SUMMARY + SAMPLED, 4), "float32")
    engine.bind({"x": source}, {output_of(product): found})()
    return backend.download(found)


def test_the_graph_shows_ranges_and_rows_of_an_input() -> None:
    values = np.arange(2 * 40 * 4, dtype=np.float32).reshape(2, 40, 4) - 100
    found, rows = shown(values), values.reshape(-1, 4)
    np.testing.assert_array_equal(found[0], np.abs(rows).max(axis=0))
    np.testing.assert_allclose(found[1], np.abs(rows).sum(axis=0), rtol=1e-6)
    places = (np.arange(SAMPLED) * GOLDEN_RATIO % 1).astype(np.float32)
    np.testing.assert_array_equal(found[SUMMARY:], rows[(places * len(rows)).astype(int)])


@pytest.mark.parametrize("images", [1, 16, 32])
@pytest.mark.parametrize("tokens", [49, 64, 256])
def test_rows_of_different_tokens_are_shown(images: int, tokens: int) -> None:
    values = np.broadcast_to(np.arange(tokens, dtype=np.float32)[:, None], (images, tokens, 4))
    assert len(np.unique(shown(np.ascontiguousarray(values))[SUMMARY:, 0])) > SAMPLED // 4


def test_a_scale_that_is_no_positive_number_is_refused(golden_engine: Path) -> None:
    manifest = EngineDir.open(golden_engine).manifest
    unit = next(unit for unit in manifest.graphs if unit.name == NAME)
    scale = replace(unit.parameters[0], name="w.input_scale", shape=(), offset=0)
    unit = replace(unit, parameters=(scale,), weight_format="int8")
    mapped_weights(unit, memoryview(np.float32(0.5).tobytes()))
    for value in (0, -1, np.nan, np.inf):
        with pytest.raises(
            EngineDirError, match=r"w.input_scale has a value that is not a positive"
        ):
            mapped_weights(unit, memoryview(np.float32(value).tobytes()))


def test_formats_that_cannot_be_calibrated_are_refused() -> None:
    check_calibrated(["w8"], "bf16", choices=0)
    check_calibrated(["w8", "int8"], "fp16", choices=3)
    with pytest.raises(UsageError, match="no kernels for bf16"):
        check_calibrated(["w8", "int8"], "bf16", choices=3)
    with pytest.raises(UsageError, match="no captions; add `captions`"):
        check_calibrated(["int8+smooth"], "fp32", choices=0)


def test_the_kind_of_a_unit_is_its_name_without_the_block() -> None:
    assert kind_of("block_03_mlp") == "mlp"
