"""The Polygraphy command lines of docs/gpu.md that need no GPU."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BIN

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

TEXT = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text().replace("\\\n", " ")
LINES = [
    line for line in re.findall(r"^    (polygraphy .*)$", TEXT, re.MULTILINE) if " run " not in line
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split()[1:3]))
def test_a_unit_can_be_looked_at(golden_engine: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "engine").symlink_to(golden_engine)
    words = shlex.split(line.replace("256,1152", "16,64").replace("1152", "64"))
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "convert" in words:
        assert (tmp_path / "attn.engine").read_bytes().startswith(b"vtrt")
