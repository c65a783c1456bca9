"""Timings that TensorRT measures while it builds are kept for later builds.

The builder here counts what it times.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engines import choice, cuda, driver
from goc_deploy.engines.choice import BackendOptions
from goc_deploy.engines.tensorrt import selection, store
from goc_deploy.engines.tensorrt.library import Library
from goc_deploy.errors import ResourceError
from goc_deploy.options import EngineOptions, no_progress
from tests.stand_ins.device import StandInDevice

pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

BUILDER = Path(__file__).parents[2] / "stand_ins" / "builder"
FOLDER = "engines/tensorrt-99.2-sm90"
TIMINGS = f"{FOLDER}/timings-NVIDIA-H100-cuda13.cache"


@pytest.fixture(autouse=True)
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The builder, in this process and in the build process, and a GPU."""
    monkeypatch.syspath_prepend(BUILDER)
    monkeypatch.setenv("PYTHONPATH", str(BUILDER))
    monkeypatch.delenv("POLYGRAPHY_USE_TENSORRT_RTX", raising=False)
    monkeypatch.setattr(driver, "device_capability", lambda *_: "9.0")
    monkeypatch.setattr(store, "driver_version", lambda: 13)
    on_gpu(monkeypatch, "NVIDIA H100")
    yield
    sys.modules.pop("tensorrt", None)


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(store, "gpu_name", lambda *_: name)
    monkeypatch.setenv("STAND_IN_GPU", name)


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_engine, tmp_path / "engine"))


def build(directory: Path, weights: str = "embedded") -> tuple[Manifest, list[int]]:
    """Build everything anew; how many layers were timed for each engine."""
    manifest = replace(EngineDir.open(directory).manifest, engines=())
    (directory / MANIFEST_NAME).write_text(manifest_to_json(manifest))
    opened, built = store.build_engines(
        EngineDir.open(directory), EngineOptions("tensorrt", weight_mode=weights), no_progress
    )
    manifest = opened.manifest
    assert built == len(manifest.engines) > 0
    return manifest, [
        json.loads((directory / entry.path).read_text())["timed"] for entry in manifest.engines
    ]


def test_blocks_that_are_alike_and_later_builds_find_the_timings(engine: Path) -> None:
    manifest, timed = build(engine)
    of_graph = dict(zip((entry.graphs[0] for entry in manifest.engines), timed, strict=True))
    assert of_graph["onnx/block_00_attn.onnx"] > 0
    assert [of_graph[f"onnx/block_0{block}_attn.onnx"] for block in (1, 2, 3)] == [0, 0, 0]
    assert [file.path for file in manifest.files if "timings" in file.path] == [TIMINGS]
    before = (engine / TIMINGS).read_bytes()
    manifest, timed = build(engine)
    assert sum(timed) == 0
    assert (engine / TIMINGS).read_bytes() == before


def test_engines_have_a_profile_for_one_image_and_one_for_the_most(engine: Path) -> None:
    manifest, _ = build(engine, "shared")
    entries = {entry.graphs[0]: entry for entry in manifest.engines}
    assert entries["onnx/block_00_attn.onnx"].optima == ("batch=2", "batch=32")
    assert len(entries["onnx/conditioning.onnx"].optima) == 1
    first, second = json.loads((engine / entries["onnx/block_00_attn.onnx"].path).read_text())[
        "profiles"
    ]
    assert (
        (first["x"][0], first["x"][2])
        == (second["x"][0], second["x"][2])
        == ([1, 16, 64], [32, 16, 64])
    )
    assert (first["x"][1], second["x"][1]) == ([2, 16, 64], [32, 16, 64])


@pytest.mark.parametrize("damage", ["changed", "missing", "no timings", "another version"])
def test_damaged_timings_are_measured_again_and_replaced(
    engine: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = build(engine, "shared")
    sound = (engine / TIMINGS).read_bytes()
    if damage == "missing":
        (engine / TIMINGS).unlink()
    elif damage == "changed":
        (engine / TIMINGS).write_bytes(sound + b"?")
    else:  # listed, but TensorRT does not take them
        content = b"?" if damage == "no timings" else sound.replace(b"99.2", b"99.1")
        store.TimingCache(EngineDir.open(engine), TIMINGS).keep(content)
    _, again = build(engine, "shared")
    assert again == first
    assert "timings are not used: " in caplog.text
    assert (engine / TIMINGS).read_bytes() == sound
    assert sum(build(engine, "shared")[1]) == 0


def test_another_gpu_of_the_same_capability_has_timings_of_its_own(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = build(engine, "shared")
    on_gpu(monkeypatch, "NVIDIA H200")
    assert build(engine, "shared")[1] == first
    assert len([*(engine / FOLDER).glob("timings-*.cache")]) == 2
    on_gpu(monkeypatch, "NVIDIA H100")
    assert sum(build(engine, "shared")[1]) == 0


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_engines_for_another_gpu_than_the_first_are_built_on_it(
    engine: Path, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, capabilities = ("NVIDIA H100", "NVIDIA L40S"), ("9.0", "8.9")
    monkeypatch.setattr(driver, "device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(store, "gpu_name", lambda index=0: names[index])
    monkeypatch.setenv("STAND_IN_GPU", ",".join(names))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(cuda, "cuda_device", lambda *_, **__: StandInDevice())

    def only_built(directory: EngineDir, library: Library, capability: str, *_: Any, **how: Any):
        options = EngineOptions(library.backend, (capability,), "shared")
        build = how.get("build", store.build_engines)
        return build(directory, options, no_progress)[0].manifest

    monkeypatch.setattr(selection, "tensorrt_backend", only_built)
    chosen = BackendOptions(device="cuda:1")
    manifest = choice.tensorrt_backend_here("tensorrt", EngineDir.open(engine), chosen)
    assert {entry.target.capabilities for entry in manifest.engines} == {("8.9",)}
    timings = engine / "engines/tensorrt-99.2-sm89/timings-NVIDIA-L40S-cuda13.cache"
    assert timings.read_text().startswith("timings of 99.2 on NVIDIA L40S\n")


def test_a_build_that_runs_out_of_memory_says_so(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_OUT_OF_MEMORY", "1")
    with pytest.raises(
        ResourceError,
        match=r"unit conditioning: .*not enough GPU memory .*set "
        r"`EngineOptions.scratch_limit_bytes`",
    ):
        build(engine)
