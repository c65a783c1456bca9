"""Comparing engines with ONNX Runtime.

The engines of the stand-in are right until a test breaks one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import WEIGHT_MODES
from goc_deploy.engines import driver
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.engines.tensorrt.verify import verify_engines
from goc_deploy.errors import EnvironmentUnsupportedError, VerificationError
from goc_deploy.options import no_progress
from tests.conftest import GOLDEN, Command
from tests.stand_ins.loading import copy_with_engines, stand_in_backend


@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_every_graph_that_has_an_engine_is_compared(
    golden_engine: Path, tmp_path: Path, weights: str
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", weights)
    backend, _ = stand_in_backend(engine)
    directory = EngineDir.open(engine)
    found = verify_engines(directory, backend, OrtBackend(), no_progress)
    manifest = directory.manifest
    assert {unit.name for unit in manifest.graphs} <= {difference.unit for difference in found}
    assert len(found) == sum(len(entry.graphs) for entry in manifest.engines)
    assert max(difference.relative_l2 for difference in found) < 1e-5


def test_an_engine_that_computes_something_else_is_named(
    golden_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "embedded")
    backend, _ = stand_in_backend(engine)
    stream = backend.own_stream
    download = stream.download
    monkeypatch.setattr(
        stream,
        "download",
        lambda buffer: download(buffer) * (1 + 0.01 * (buffer.shape[1:] == (4, 8, 8))),
    )
    with pytest.raises(
        VerificationError, match=r"unit sampler: tensorrt-rtx differs from ONNX Runtime by 1.00e-02"
    ):
        verify_engines(EngineDir.open(engine), backend, OrtBackend(), no_progress)
    monkeypatch.setattr(stream, "download", lambda buffer: np.full(buffer.shape, np.nan))
    with pytest.raises(VerificationError, match="differs from ONNX Runtime by inf"):
        verify_engines(EngineDir.open(engine), backend, OrtBackend(), no_progress)


def test_without_a_gpu_verification_is_refused_before_the_export_begins(
    command: Command, tmp_path: Path
) -> None:
    try:
        driver.device_capability()
    except EnvironmentUnsupportedError:
        options = ("-o", tmp_path / "engine", "--backend", "tensorrt-rtx", "--verify")
        done = command("goc-export", GOLDEN / "model.pt", *options, code=5)
        assert "there is no NVIDIA driver here" in done.stderr
        assert not list(tmp_path.iterdir())
    done = command("goc-plan", "nowhere", "--verify", "--list", code=2)
    assert "options of engines go with --backend" in done.stderr
