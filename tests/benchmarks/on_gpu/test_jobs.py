from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.on_gpu.jobs import Deadline, Job, run_part


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_deadline_keeps_what_later_parts_need() -> None:
    clock = Clock()
    deadline = Deadline(60, clock)
    assert (deadline.left, deadline.limit(20), deadline.limit(90), deadline.limit(90, 25)) == (
        60,
        20,
        60,
        35,
    )
    clock.now += 50
    assert (deadline.left, deadline.limit(20), deadline.limit(20, 25)) == (10, 10, 0)
    clock.now += 50
    assert deadline.left == 0


def test_a_part_is_left_out_where_the_time_does_not_suffice(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    outcome = run_part(
        "late", python(f"open({str(marker)!r}, 'w')"), tmp_path / "log", Deadline(3), 60, least_s=5
    )
    assert (outcome.state, outcome.reason) == ("left out", "3 s were left, and it needs at least 5")
    assert not marker.exists()


def test_a_part_that_ends_well_is_done(tmp_path: Path) -> None:
    assert (
        run_part("good", python("print('x')"), tmp_path / "log", Deadline(60), 60).state == "done"
    )
    assert (tmp_path / "log").read_text() == "x\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no luck')", "exit code 1; its last line: no luck"),
        (
            "import os; print('before', flush=True); os.abort()",
            "ended by SIGABRT; its last line: before",
        ),
    ],
)
def test_a_part_that_fails_names_the_reason(tmp_path: Path, code: str, reason: str) -> None:
    outcome = run_part("bad", python(code), tmp_path / "log", Deadline(60), 60)
    assert (outcome.state, outcome.reason) == ("failed", reason)


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
        "print(p.pid, flush=True); p.wait()"
    )
    started = time.monotonic()
    outcome = run_part("stuck", python(child), tmp_path / "log", Deadline(60), 3)
    assert outcome.state == "timed out"
    assert time.monotonic() - started < 30
    pid = int((tmp_path / "log").read_text())
    deadline = Deadline(10)
    while deadline.left and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout
    return bool(state.strip()) and not state.startswith(
        "Z"
    )  # nobody waits for it where there is no init


def test_the_tree_is_found_wherever_a_job_runs(tmp_path: Path) -> None:
    job = Job(
        "path", python("import benchmarks.report, goc_deploy, tests.conftest"), tmp_path / "log"
    )
    assert job.finish(60).state == "done", (tmp_path / "log").read_text()
