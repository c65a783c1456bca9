"""Kernels that TensorRT for RTX compiles while it runs are kept for the next process.

The tests run on the stand-ins.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engines.tensorrt import selection
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline

FOLDER = "engines/tensorrt-rtx-99.1-sm89"
KERNELS = f"{FOLDER}/kernels-a-stand-in-on-host-memory-cuda13.cache"


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "driver_version", lambda: 13)


@pytest.fixture(scope="module")
def built(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_engines(golden_engine, tmp_path_factory.mktemp("kernels") / "engine", "shared")


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


def compiled(engine: Path, *sizes: int, plan: str = "fora:2") -> int:
    """Run requests of so many images in a pipeline of its own; how many kernels it compiled."""
    pipe, tensorrt = stand_in_pipeline(engine, plan)
    for images in sizes:
        assert np.isfinite(pipe.generate([1] * images).latents).all()
    return len(tensorrt.compiled)


def test_the_next_process_compiles_only_what_is_new(engine: Path) -> None:
    assert compiled(engine, 1) > 0
    assert KERNELS in EngineDir.open(engine)
    before = (engine / MANIFEST_NAME).read_bytes()
    assert compiled(engine, 1, 1) == 0
    assert (engine / MANIFEST_NAME).read_bytes() == before
    assert compiled(engine, 1, 2) > 0
    assert compiled(engine, 2, 1) == 0


@pytest.mark.parametrize("damage", ["changed", "missing", "not taken"])
def test_damaged_kernels_are_compiled_again_and_replaced(
    engine: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(engine, 1)
    path = engine / KERNELS
    with monkeypatch.context() as patched:
        if damage == "changed":
            path.write_bytes(path.read_bytes() + b"?")
        elif damage == "missing":
            path.unlink()
        else:
            patched.setattr(
                "tests.stand_ins.tensorrt_context.RuntimeCache.deserialize",
                lambda _self, _content: False,
            )
        assert compiled(engine, 1) == first
    assert "compiled kernels are not loaded: " in caplog.text
    assert path.exists()
    assert compiled(engine, 1) == 0


def test_gpus_of_one_compute_capability_and_drivers_keep_their_kernels_apart(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(gpu: str, driver: int) -> int:
        monkeypatch.setattr(
            StandInDevice, "describe", lambda _self: {"device": gpu, "cuda_graphs": True}
        )
        monkeypatch.setattr(selection, "driver_version", lambda: driver)
        return compiled(engine, 1)

    ways = [("NVIDIA L4", 13), ("NVIDIA L40S", 13), ("NVIDIA L40S", 14)]
    first = [on(*way) for way in ways]
    assert min(first) > 0
    assert [on(*way) for way in ways] == [0, 0, 0]
    names = {f"kernels-NVIDIA-{name}.cache" for name in ("L4-cuda13", "L40S-cuda13", "L40S-cuda14")}
    assert {path.name for path in (engine / FOLDER).glob("*.cache")} == names
    assert all(f"{FOLDER}/{name}" in EngineDir.open(engine) for name in names)


def test_a_directory_that_cannot_be_written_is_run_all_the_same(
    engine: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    caplog.set_level("INFO")
    monkeypatch.setattr(os, "replace", read_only)
    assert compiled(engine, 1) == compiled(engine, 1) > 0
    assert f"compiled kernels are not kept: keeping {KERNELS} in" in caplog.text
    assert "Read-only file system" in caplog.text


def test_tensorrt_that_compiles_at_build_time_keeps_nothing(
    golden_engine: Path, tmp_path: Path
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared", "tensorrt")
    pipe, tensorrt = stand_in_pipeline(engine, "fora:2", library="tensorrt")
    before = (engine / MANIFEST_NAME).read_bytes()
    pipe.generate([1])
    assert tensorrt.compiled
    assert (engine / MANIFEST_NAME).read_bytes() == before
