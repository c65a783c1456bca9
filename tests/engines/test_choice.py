from __future__ import annotations

from pathlib import Path

import pytest

import goc_deploy
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines import driver
from goc_deploy.engines.choice import FASTEST_FIRST, BackendOptions, candidates, explanation
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError, UsageError
from tests.conftest import Command
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import copy_with_engines, gpu_of_stand_ins
from tests.stand_ins.tensorrt import StandInTensorrt
from tests.stand_ins.tensorrt_context import Severity


def no_gpu(_index: int = 0) -> str:
    raise EnvironmentUnsupportedError("there is no NVIDIA driver here")


def test_the_fastest_is_tried_first_and_a_named_one_alone(golden_engine: Path) -> None:
    directory = EngineDir.open(golden_engine)
    assert [name for name, _ in candidates("auto", directory, BackendOptions())] == list(
        FASTEST_FIRST
    )
    assert [name for name, _ in candidates("tensorrt", directory, BackendOptions())] == ["tensorrt"]
    with pytest.raises(UsageError, match="there is no backend 'cuda'; use auto, tensorrt"):
        list(candidates("cuda", directory, BackendOptions()))
    for device in ("gpu", 3, None):
        with pytest.raises(UsageError, match=f"there is no device {device!r}; use cpu, cuda"):
            _ = BackendOptions(device=device).gpu  # type: ignore[arg-type]


def test_auto_without_a_gpu_says_why_it_takes_the_cpu(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "device_capability", no_gpu)
    with goc_deploy.load(golden_engine) as pipe:
        report = pipe.generate([1]).report
    assert report["backend"] == "onnxruntime"
    assert report["passed_over"] == dict.fromkeys(
        FASTEST_FIRST[:3], "there is no NVIDIA driver here"
    )
    assert explanation("onnxruntime", report["passed_over"]) == (
        "backend onnxruntime is the fastest that works here; "
        "tensorrt, tensorrt-rtx, onnxruntime-cuda: there is no NVIDIA driver here"
    )
    with goc_deploy.load(golden_engine, backend="onnxruntime") as pipe:
        assert pipe.generate([1]).report["passed_over"] == {}


def test_a_named_backend_is_never_replaced_by_another(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "device_capability", no_gpu)
    for name in FASTEST_FIRST[:3]:
        with pytest.raises(EnvironmentUnsupportedError, match="there is no NVIDIA driver here"):
            goc_deploy.load(golden_engine, backend=name)


def test_auto_takes_tensorrt_where_it_works_and_goes_on_where_it_does_not(
    golden_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared")
    tensorrt = StandInTensorrt(StandInDevice())
    gpu_of_stand_ins(monkeypatch, tensorrt)
    with goc_deploy.load(engine) as pipe:
        report = pipe.generate([1]).report
    assert (report["backend"], report["passed_over"]) == (
        "tensorrt-rtx",
        {"tensorrt": "tensorrt cannot be imported"},
    )
    assert tensorrt.calls
    refusals = tensorrt.failures["deserialize_cuda_engine"] = [
        (Severity.ERROR, "the driver is too old")
    ]
    with goc_deploy.load(engine) as pipe:
        report = pipe.generate([1]).report
    assert report["backend"] == "onnxruntime"
    assert "the driver is too old" in report["passed_over"]["tensorrt-rtx"]
    assert "has no CUDAExecutionProvider" in report["passed_over"]["onnxruntime-cuda"]
    refusals[0] = (Severity.ERROR, "Cuda Runtime (out of memory)")
    with pytest.raises(
        ResourceError, match="not enough GPU memory"
    ):  # a smaller batch may; the CPU is no answer to that
        goc_deploy.load(engine)


@pytest.mark.parametrize("name", ["tensorrt-rtx", "auto"])
def test_auto_goes_on_where_tensorrt_has_no_target_for_the_gpu(
    golden_engine: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu_of_stand_ins(monkeypatch, StandInTensorrt(StandInDevice()), capability="9.0")
    if name != "auto":
        with pytest.raises(EnvironmentUnsupportedError, match=r"has no target 9.0"):
            goc_deploy.load(golden_engine, backend=name)
        return
    with goc_deploy.load(golden_engine) as pipe:
        passed_over = pipe.generate([1]).report["passed_over"]
    assert list(passed_over) == list(FASTEST_FIRST[:3])
    assert "tensorrt-rtx 99.1 has no target 9.0" in passed_over["tensorrt-rtx"]
    assert "built now" not in caplog.text


def test_the_command_names_the_backend_and_why(
    golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "x.npy"
    done = command("goc-run", golden_engine, "--labels", "1", "--latents-output", out, code=None)
    fell_back = "on onnxruntime " in done.stderr
    assert ("-v tells why no faster backend" in done.stderr) == fell_back
    assert "is the fastest that works here" not in done.stderr
    done = command(
        "goc-run", golden_engine, "--labels", "1", "--latents-output", out, "-v", code=None
    )
    assert (
        "INFO: backend onnxruntime is the fastest that works here; " in done.stderr
    ) == fell_back
    try:
        driver.device_capability()
    except EnvironmentUnsupportedError:
        refused = command(
            "goc-run", golden_engine, "--labels", "1", "--backend", "tensorrt", code=5
        )
        assert "there is no NVIDIA driver here" in refused.stderr
