from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

THREADS = """
import sys, threading, time, goc_deploy
pipe = goc_deploy.load(sys.argv[1], max_sessions=4)
def generate():
    while True:
        pipe.generate([1, 2])
def stuck():
    pipe.generate([1], callback=lambda _: threading.Event().wait())
for target in (generate, generate, generate, stuck):
    threading.Thread(target=target, daemon=True).start()
time.sleep(float(sys.argv[2]))
print("the end")
"""


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_the_interpreter_ends_cleanly_while_daemon_threads_generate(
    seconds: float, golden_engine: Path
) -> None:
    words = [sys.executable, "-c", THREADS, str(golden_engine), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
    assert "Fatal" not in done.stderr
