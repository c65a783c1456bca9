"""The curl lines of docs/serving.md and of README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import goc_deploy
from tests.documents.blocks import blocks
from tests.goc_deploy.serving.running import TOKEN, Running

ROOT = Path(__file__).parents[3]
ADDRESS = "http://127.0.0.1:8000"
pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def run_lines(document: Path, running: Running, folder: Path) -> str:
    """Run the curl lines of a document in a folder; what they print on stdout."""
    found = blocks(document.read_text(encoding="utf-8"))
    (lines,) = [block.text for block in found if block.text.startswith("curl ")]
    assert ADDRESS in lines
    (folder / ".curlrc").write_text(f'header = "Authorization: Bearer {TOKEN}"\nsilent\n')
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines.replace(ADDRESS, running.url)],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "CURL_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_lines_get_pictures_a_stream_and_an_error(
    demo_engine: Path, tmp_path: Path
) -> None:
    running = Running(demo_engine, "--backend", "onnxruntime", "--plan", "none", "--plan", "fora:2")
    running.wait()
    printed = run_lines(ROOT / "docs" / "serving.md", running, tmp_path)
    with goc_deploy.load(demo_engine, plan="fora:2", backend="onnxruntime") as pipe:
        expected = pipe.generate([7] * 4, seed=1).images
    for i, image in enumerate(expected):
        drawn = np.asarray(Image.open(tmp_path / f"seven-{i}.png"))
        np.testing.assert_array_equal(drawn, image[..., 0])
    assert printed.count("event: image_generation.partial_image\n") == 3
    assert printed.count("event: image_generation.completed\n") == 1
    assert '"id":"engine"' in printed
    assert "there is no model 'dall-e-3'; there are engine" in printed
    assert "size '1024x1024' does not exist; model engine has 28x28" in printed
    assert "the server ends the request" in printed
    deadline = time.monotonic() + 60
    while 'outcome="cancelled"' not in running.client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert running.stop() == (0, "")


def test_the_line_of_the_readme_draws_a_class_by_its_name(
    demo_engine: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "dit"
    shutil.copytree(demo_engine, engine)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["class_names"] = [f"thing {i}" for i in range(9)] + ["golden retriever"]
    (engine / "manifest.json").write_text(json.dumps(manifest))
    running = Running(engine, "--backend", "onnxruntime", "--plan", "fora:2")
    running.wait()
    run_lines(ROOT / "README.md", running, tmp_path)
    with goc_deploy.load(demo_engine, plan="fora:2", backend="onnxruntime") as pipe:
        expected = pipe.generate([9], seed=1).images[0]
    drawn = np.asarray(Image.open(tmp_path / "retriever.png"))
    np.testing.assert_array_equal(drawn, expected[..., 0])
    assert running.stop() == (0, "")
