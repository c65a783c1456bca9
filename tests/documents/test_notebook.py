"""docs/tutorial.ipynb runs, prints what it shows, and stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents.files import ROOT
from tests.documents.outputs import same_output

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
MAX_BYTES = 60_000
RUN = "from nbclient.cli import main; main()"


def outputs(notebook: Path) -> list[list[tuple[str, str]]]:
    """(kind, text) of all outputs of each cell with code; pictures have no text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        [_output(one) for one in cell["outputs"]] for cell in cells if cell["cell_type"] == "code"
    ]


def _output(output: dict[str, Any]) -> tuple[str, str]:
    if output["output_type"] == "stream":
        return output["name"], "".join(output["text"])
    assert output["output_type"] != "error", output
    if "image/png" in output["data"]:
        return "image/png", ""
    return "text/plain", "".join(output["data"]["text/plain"])


def test_the_notebook_is_small_and_has_no_warnings() -> None:
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    kinds = {kind for cell in outputs(NOTEBOOK) for kind, _ in cell}
    assert kinds == {"stdout", "text/plain", "image/png"}


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    reason = "nbclient and ipykernel come with the notebook extra"
    pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK), "--output", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown, found = outputs(NOTEBOOK), outputs(tmp_path / "run.ipynb")
    for wanted, printed in zip(shown, found, strict=True):
        assert [kind for kind, _ in printed] == [kind for kind, _ in wanted]
        for (_, text), (_, now) in zip(wanted, printed, strict=True):
            assert same_output(text, now, vary=False), now
