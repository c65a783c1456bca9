"""Engine directories loaded on the stand-ins."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from goc_deploy.compiler.plan_file import plan_to_json
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.engines import cuda, driver
from goc_deploy.engines.ort_cuda import OrtCudaBackend
from goc_deploy.engines.tensorrt import library as tensorrt_library
from goc_deploy.engines.tensorrt.backend import TensorrtBackend
from goc_deploy.engines.tensorrt.library import Library
from goc_deploy.engines.tensorrt.selection import tensorrt_backend
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.options import EngineOptions, no_progress
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.pipeline import Pipeline
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.tensorrt import StandInTensorrt

CAPABILITY = "8.9"


def copy_with_engines(
    source: Path,
    target: Path,
    weights: str,
    library: str = "tensorrt-rtx",
    kernels: int | None = 1,
    *,
    segments: bool = True,
) -> Path:
    """A copy of an engine directory with engines of the stand-in."""
    shutil.copytree(source, target)
    if not segments:
        drop_segments(target)
    options = EngineOptions(library, (CAPABILITY,), weights)
    StandInTensorrt(StandInDevice(), library, kernels).build_engines(
        EngineDir.open(target), options, no_progress
    )
    return target


def drop_segments(directory: Path) -> None:
    """Make a directory one whose plans were added with ``--segments none``."""
    opened = EngineDir.open(directory)
    manifest = opened.manifest
    for entry in manifest.plans:
        plan = replace(opened.plan(entry.name), segments="none")
        (directory / entry.plan).write_text(plan_to_json(plan))
    plans, dropped = {entry.plan for entry in manifest.plans}, set(manifest.segments.values())
    kept = [file for file in manifest.files if file.path not in dropped]
    files = tuple(file_entry(directory, file.path) if file.path in plans else file for file in kept)
    (directory / MANIFEST_NAME).write_text(
        manifest_to_json(replace(manifest, files=files, segments={}))
    )
    for path in dropped:
        (directory / path).unlink()


def stand_in_backend(
    directory: Path, library: str = "tensorrt-rtx", **device: Any
) -> tuple[TensorrtBackend, StandInTensorrt]:
    """The real backend on stand-ins."""
    tensorrt = StandInTensorrt(StandInDevice(**device), library)
    opened = EngineDir.open(directory)
    backend = tensorrt_backend(
        opened, tensorrt.library, CAPABILITY, tensorrt.device, build=tensorrt.build_engines
    )
    return backend, tensorrt


def stand_in_pipeline(
    directory: Path, plan: str, sessions: int = 1, library: str = "tensorrt-rtx", **device: Any
) -> tuple[Pipeline, StandInTensorrt]:
    """A real pipeline on stand-ins."""
    backend, tensorrt = stand_in_backend(directory, library, **device)
    opened = EngineDir.open(directory)
    return load_pipelines(opened, backend, [plan], None, sessions)[0], tensorrt


def gpu_of_stand_ins(
    monkeypatch: pytest.MonkeyPatch, tensorrt: StandInTensorrt, capability: str = CAPABILITY
) -> None:
    """Put stand-ins where the product asks the driver for a GPU, and imports what runs on it.

    There is one TensorRT, and ONNX Runtime has the CPU provider only.
    """

    def library_from_backend(name: str) -> Library:
        if name != tensorrt.backend:
            raise EnvironmentUnsupportedError(f"{name} cannot be imported")
        return tensorrt.library

    runtime = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(driver, "device_capability", lambda *_: capability)
    monkeypatch.setattr(cuda, "cuda_device", lambda *_, **__: tensorrt.device)
    monkeypatch.setattr(tensorrt_library, "library_from_backend", library_from_backend)
    monkeypatch.setattr(OrtCudaBackend, "runtime", runtime)
