"""The curl lines of docs/serving.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import goc_deploy
from tests.documents.blocks import blocks
from tests.goc_deploy.serving.running import TOKEN, Running

DOCUMENT = Path(__file__).parents[3] / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_documented_lines_get_pictures_a_stream_and_an_error(
    demo_engine: Path, tmp_path: Path
) -> None:
    found = blocks(DOCUMENT.read_text(encoding="utf-8"))
    (lines,) = [block.text for block in found if block.text.startswith("curl ")]
    running = Running(demo_engine, "--backend", "onnxruntime", "--plan", "none", "--plan", "fora:2")
    running.wait()
    assert ADDRESS in lines
    (tmp_path / ".curlrc").write_text(f'header = "Authorization: Bearer {TOKEN}"\nsilent\n')
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines.replace(ADDRESS, running.url)],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "CURL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with goc_deploy.load(demo_engine, plan="fora:2", backend="onnxruntime") as pipe:
        expected = pipe.generate([7] * 4, seed=1).images
    for i, image in enumerate(expected):
        drawn = np.asarray(Image.open(tmp_path / f"seven-{i}.png"))
        np.testing.assert_array_equal(drawn, image[..., 0])
    assert done.stdout.count("event: image_generation.partial_image\n") == 3
    assert done.stdout.count("event: image_generation.completed\n") == 1
    assert '"id":"engine"' in done.stdout
    assert "there is no model 'dall-e-3'; there are engine" in done.stdout
    assert running.stop() == (0, "")
