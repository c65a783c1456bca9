"""What `make test-gpu` runs, as far as no GPU is needed; `make test-gpu DRY=1` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.on_gpu.jobs import Deadline
from tests import on_gpu

LOG = """\
tests/a/test_x.py::test_one PASSED                                  [ 20%]
tests/a/test_x.py::test_two[fora:2+gc:1.2-float16] FAILED           [ 40%]
tests/a/test_x.py::test_three SKIPPED (no TensorRT)                 [ 60%]
tests/a/test_x.py::test_four ERROR                                  [ 80%]
SKIPPED [1] tests/a/test_x.py:9: no TensorRT
FAILED tests/a/test_x.py::test_two[fora:2+gc:1.2-float16] - assert 1 == 2
ERROR tests/a/test_x.py::test_four - RuntimeError: x
tests/a/test_x.py::test_five"""


def test_there_are_tests_for_a_gpu_and_each_belongs_to_a_part() -> None:
    tests = on_gpu.collected()
    assert len(tests) > 50
    parts = on_gpu.divided(tests)
    assert sorted(test for part in parts.values() for test in part) == sorted(tests)
    assert list(parts)[:3] == ["kernel", "device", "onnxruntime-cuda"]
    assert len(parts["kernel"]) >= 19
    assert all("tensorrt" in test for name in ("tensorrt", "tensorrt-rtx") for test in parts[name])


def test_verdicts_are_read_off_the_log() -> None:
    part = on_gpu.Part("x")
    assert len(on_gpu.note(part, LOG)) == 4
    assert part.passed == ["tests/a/test_x.py::test_one"]
    assert [len(part.failed), len(part.skipped)] == [2, 1]
    assert part.reasons[0] == "1 skipped: no TensorRT"
    assert part.reasons[1].endswith("assert 1 == 2")
    assert "| x | 1 | 2 | 0 | 1 | 0 | 0 |" in on_gpu.table([part])


def test_a_test_that_ends_the_process_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n"
    )
    (tmp_path / "tests" / "test_x.py").write_text(
        "import os, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_a(): pass\ndef test_b(): os.abort()\ndef test_c(): pass\ndef test_d(): assert 0\n"
    )
    monkeypatch.setattr("benchmarks.on_gpu.jobs.ROOT", tmp_path)
    tests = [f"tests/test_x.py::test_{letter}" for letter in "abcd"]
    part = on_gpu.run("x", tests, Deadline(100), tmp_path / "log")
    assert (part.passed, part.crashed, part.failed) == (
        [tests[0], tests[2]],
        [tests[1]],
        [tests[3]],
    )
    assert any("ended by SIGABRT" in reason for reason in part.reasons)


def test_tests_are_left_out_where_the_time_does_not_suffice(tmp_path: Path) -> None:
    part = on_gpu.run("x", ["tests/a.py::b"], Deadline(on_gpu.LEAST_SECONDS - 1), tmp_path / "log")
    assert part.left_out == ["tests/a.py::b"]


def test_only_a_dry_run_may_skip_everything() -> None:
    skipped, passed = on_gpu.Part("x", skipped=["a"]), on_gpu.Part("y", passed=["b"])
    failed, late = on_gpu.Part("z", failed=["c"]), on_gpu.Part("z", left_out=["c"])
    assert on_gpu.exit_code([skipped], dry=False) == 5
    assert (
        on_gpu.exit_code([skipped], dry=True) == on_gpu.exit_code([skipped, passed], dry=False) == 0
    )
    assert (
        on_gpu.exit_code([passed, failed], dry=False)
        == on_gpu.exit_code([passed, late], dry=True)
        == 1
    )
