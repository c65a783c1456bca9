"""Segments: what their units compute in turn, and how plans and directories keep them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import goc_deploy
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import ConflictError, EngineDirError
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.needed_graphs import needed_graphs
from tests.conftest import GOLDEN_PLANS, Command
from tests.reference import worst_step
from tests.stand_ins.loading import drop_segments


class MergingOrt(OrtBackend):
    """ONNX Runtime, told to run plans as TensorRT does."""

    stacks = True


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_engine, tmp_path / "engine"))


@pytest.mark.parametrize("spec", ["none", "fora:2+gc:1.2"])
def test_a_segment_computes_what_its_units_compute(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    opened, backend = EngineDir.open(golden_engine), MergingOrt()
    with load_pipelines(opened, backend, [spec], None, 1)[0] as pipe:
        needed = needed_graphs(opened, [pipe.plan], backend)
        assert not set(pipe.spec.unit_names) & needed.units.keys()
        found = pipe.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
    assert worst_step(found.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5


def test_tensors_have_the_names_of_their_units_and_weights_stay_where_they_lie(
    golden_engine: Path,
) -> None:
    manifest = read_manifest(golden_engine)
    names = manifest.model.unit_names
    graph = onnx.load(golden_engine / manifest.segments["w*8"], load_external_data=False).graph
    assert [value.name for value in graph.input] == [
        "x",
        *(f"{name}.{vector}" for name in names for vector in ("shift", "scale", "gate")),
    ]
    assert [value.name for value in graph.output] == [
        *(f"{name}.feature" for name in names),
        "x_out",
    ]
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    found = {name: (place["location"], int(place["offset"])) for name, place in places.items()}
    parts = manifest.parts(manifest.segment_graph("w*8"))
    assert found == {
        prefix + p.name: (Path(str(part.weights_file)).name, p.offset)
        for prefix, part in parts.items()
        for p in part.parameters
    }
    nothing_stored = onnx.load(
        golden_engine / manifest.segments["-*8"], load_external_data=False
    ).graph
    assert [value.name for value in nothing_stored.output] == ["x_out"]


def test_a_plan_keeps_what_it_was_added_with(engine: Path) -> None:
    before = read_manifest(engine)
    goc_deploy.add_plan(engine, "fora:3", segments="none")
    directory = EngineDir.open(engine)
    assert directory.plan("fora-3").segments == "none"
    assert directory.plan("fora:2").segments == "full"
    assert directory.manifest.segments == before.segments
    with pytest.raises(
        ConflictError, match="already has another plan named fora-3; choose another `name`"
    ):
        goc_deploy.add_plan(engine, "fora:3")


def test_a_directory_without_segments_gets_those_of_a_new_plan(
    engine: Path, command: Command
) -> None:
    drop_segments(engine)
    command("goc-plan", engine, "fora:4", "--segments", "none")
    assert not read_manifest(engine).segments
    command("goc-plan", engine, "fora:3", "--segments", "full", "--name", "merged")
    assert list(read_manifest(engine).segments) == ["w*8"]
    with load_pipelines(EngineDir.open(engine), MergingOrt(), ["merged"], 1, 1)[0] as pipe:
        assert np.isfinite(pipe.generate([1]).latents).all()


def test_segments_without_their_units_are_refused(engine: Path) -> None:
    found = json.loads((engine / MANIFEST_NAME).read_text())
    found["graphs"] = [unit for unit in found["graphs"] if unit["name"] != "block_02_mlp"]
    (engine / MANIFEST_NAME).write_text(json.dumps(found))
    with pytest.raises(
        EngineDirError,
        match=r"\$\.segments: made of unit block_\w+, which \$\.graphs does not list",
    ):
        read_manifest(engine)


def test_a_segment_that_a_plan_needs_and_the_directory_lacks_is_named(engine: Path) -> None:
    found = json.loads((engine / MANIFEST_NAME).read_text())
    del found["segments"]["w*8"]
    (engine / MANIFEST_NAME).write_text(json.dumps(found))
    with pytest.raises(
        EngineDirError, match=r"lists no graph for 'w\*8', which a plan needs; add the plan again"
    ):
        load_pipelines(EngineDir.open(engine), MergingOrt(), ["fora:2"], 1, 1)
