"""The digits example: its training goes on from a checkpoint, and goc-export reads its weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import goc_deploy

DIGITS = Path(__file__).parents[2] / "examples" / "mnist"


def test_training_goes_on_from_its_checkpoint_to_weights_that_are_exported(tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--batch", "2", "--decay-steps", "1", "--threads", "1"]
    for more, step in (([], 1), (["--resume"], 2)):
        line = [sys.executable, str(DIGITS / "train_dit.py"), *words, *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
        assert f"stopped after step {step}" in done.stdout, done.stderr
    again = subprocess.run([sys.executable, str(DIGITS / "train_dit.py"), *words], check=False)
    assert again.returncode == 2
    weights = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    manifest = goc_deploy.export(
        tmp_path / "dit.pt", tmp_path / "engine", num_heads=4, plans=["none"]
    )
    assert (manifest.model.depth, manifest.model.hidden) == (8, 128)
