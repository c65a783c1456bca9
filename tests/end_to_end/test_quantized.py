"""Engine directories with quantised weights: their files, their results, and their engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api import build_engines
from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import UsageError
from goc_deploy.options import EngineOptions, ExportOptions, WeightMode
from goc_deploy.runtime.loading import load_pipelines
from tests.conftest import GOLDEN, Command

OPTIONS = ExportOptions(num_heads=4, plans=("none", "fora:2+gc:1.2"))


class MergingOrt(OrtBackend):
    """ONNX Runtime, told to run plans as TensorRT does."""

    stacks = True


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 4 bits in all blocks but the first."""
    path = tmp_path_factory.mktemp("w4") / "engine"
    export_with(
        GOLDEN / "model.pt", path, replace(OPTIONS, quantize=("w4",), quantize_exclude=("first",))
    )
    return path


def final_latents(
    engine: Path, golden: dict[str, np.ndarray], plan: str, backend: OrtBackend
) -> np.ndarray:
    with load_pipelines(EngineDir.open(engine), backend, [plan], None, 1)[0] as pipe:
        result = pipe.generate(golden["labels"], cfg_scale=2.0, latents=golden["noise"])
    return np.asarray(result.latents)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_excluding_every_unit_leaves_every_file_as_it_is(
    golden_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "engine"
    export_with(
        GOLDEN / "model.pt", path, replace(OPTIONS, quantize=("w8",), quantize_exclude=("block_*",))
    )
    ours, theirs = (
        {file.path: file.sha256 for file in read_manifest(engine).files}
        for engine in (path, golden_engine)
    )
    graphs = {name for name in ours if name.startswith("onnx/")}
    assert {name: ours[name] for name in graphs} == {name: theirs[name] for name in graphs}
    assert len(graphs) > 20
    assert read_manifest(path).graphs == read_manifest(golden_engine).graphs


@pytest.mark.parametrize("plan", ["none", "fora:2+gc:1.2"])
def test_plans_run_with_weights_of_4_bits(
    w4: Path, golden_engine: Path, golden: dict[str, np.ndarray], plan: str
) -> None:
    found = final_latents(w4, golden, plan, OrtBackend())
    full = final_latents(golden_engine, golden, plan, OrtBackend())
    assert 1e-3 < relative(found, full) < 0.2
    # One graph of units with and without quantised weights.
    merged = final_latents(w4, golden, plan, MergingOrt())
    assert relative(merged, found) < 1e-4


def test_the_units_and_their_formats_are_listed(w4: Path, command: Command) -> None:
    manifest = read_manifest(w4)
    formats = {unit.name: unit.weight_format for unit in manifest.graphs}
    assert {name for name, found in formats.items() if found == "w4"} == set(
        manifest.model.unit_names[2:]
    )
    listed = command("goc-plan", w4, "--inspect").stdout
    assert listed.count(" w4 ") == len(manifest.model.unit_names) - 2
    options = json.loads((w4 / "manifest.json").read_text())["provenance"]["options"]
    assert (options["quantize"], options["quantize_exclude"]) == (["w4"], ["first"])


def test_an_equal_export_is_up_to_date(w4: Path) -> None:
    options = replace(OPTIONS, quantize=("w4",), quantize_exclude=("first",))
    assert not export_with(GOLDEN / "model.pt", w4, options)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(OPTIONS, quantize_exclude=("first",)), "`quantize_exclude` needs `quantize`"),
        (replace(OPTIONS, quantize=("w3",)), "`quantize=w3` is unknown; it is one of w8, w8"),  # type: ignore[arg-type]
        (
            replace(OPTIONS, quantize=("w8",), quantize_exclude=("final",)),
            "`quantize_exclude=final` matches none of the units block_00_attn to",
        ),
    ],
)
def test_wrong_options_are_refused(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export_with(GOLDEN / "model.pt", tmp_path / "engine", options)


@pytest.mark.parametrize("weight_mode", ["embedded", "shared"])
def test_tensorrt_builds_every_unit(w4: Path, weight_mode: WeightMode) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    options = EngineOptions(capabilities=("8.6",), weight_mode=weight_mode)
    manifest, built = build_engines(w4, options)
    assert built
    served = {name for engine in manifest.engines for name in engine.graphs}
    assert {unit.onnx for unit in manifest.graphs} <= served
