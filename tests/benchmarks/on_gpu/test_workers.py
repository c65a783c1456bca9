from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.on_gpu.workers import Worker

ANSWERS = """
import os
from benchmarks.on_gpu.workers import channel, serve
send = channel()
print("noise that is no answer")
serve(send, {"load_s": 1.0}, {"good": lambda: {"wall_ms": 2.0}, "bad": lambda: os.abort()})
"""


def test_a_worker_answers_in_turn_and_its_end_is_told(tmp_path: Path) -> None:
    worker = Worker("w", [sys.executable, "-c", ANSWERS], tmp_path / "log")
    try:
        assert worker.answer(60) == {"load_s": 1.0, "contenders": ["good", "bad"]}
        assert worker.run("good", 60) == worker.run("good", 60) == {"wall_ms": 2.0}
        with pytest.raises(RuntimeError, match="ended by SIGABRT"):
            worker.run("bad", 60)
        with pytest.raises(RuntimeError):
            worker.run("good", 1)
    finally:
        worker.close()
    assert "noise that is no answer" in (tmp_path / "log").read_text()


def test_a_worker_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    worker = Worker("w", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    with pytest.raises(RuntimeError, match="no answer within 1 s"):
        worker.answer(1)
    worker.close()
    assert worker.job.process.returncode is not None
