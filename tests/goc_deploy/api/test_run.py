"""`goc_deploy.api.run.run`: what goc-run calls once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.api.run import run
from goc_deploy.errors import UsageError
from goc_deploy.options import RunOptions


def test_a_run_in_batches_writes_what_one_request_returns(
    golden_engine: Path, tmp_path: Path
) -> None:
    options = RunOptions(
        plan="fora-2",
        labels="1,7,4",
        seed=3,
        batch_size=2,
        backend="onnxruntime",
        latents_output=tmp_path / "x.npy",
        trajectory_output=tmp_path / "t.npy",
        report=tmp_path / "r.json",
    )
    calls: list[tuple[int, int]] = []
    result = run(golden_engine, options, lambda _what, done, total: calls.append((done, total)))
    assert result.paths == (tmp_path / "x.npy", tmp_path / "t.npy", tmp_path / "r.json")
    assert (result.images, result.latents_instead, result.channels) == (3, None, 4)
    assert calls[-1] == (60, 60)
    assert calls == sorted(calls)
    assert json.loads((tmp_path / "r.json").read_text()) == result.report
    with goc_deploy.load(golden_engine, plan="fora-2", backend="onnxruntime") as pipe:
        expected = pipe.generate([1, 7, 4], seed=3, trajectory=True)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected.latents, atol=1e-4)
    assert expected.trajectory is not None
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), expected.trajectory, atol=1e-4)


def test_channels_that_guidance_leaves_alone_are_those_without_guidance(
    golden_engine: Path, tmp_path: Path
) -> None:
    one = RunOptions(labels="1", plan="none", backend="onnxruntime", latents_output=tmp_path / "x")
    outputs = []
    for options in (one, replace(one, cfg_scale=1.0), replace(one, cfg_channels=0)):
        run(golden_engine, options)
        outputs.append(np.load(tmp_path / "x"))
    guided, plain, no_channels = outputs
    np.testing.assert_allclose(no_channels, plain, atol=1e-5)
    assert np.abs(guided - plain).max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(prompts=("a cat",), prompt_embeds=Path("x.npz")),
        RunOptions(negative_prompts=("a dog",)),
        RunOptions(resume=True),
        RunOptions(resume=True, output=Path("x.png")),
        RunOptions(resume=True, output=Path("x"), latents_output=Path("x.npy")),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(
    options: RunOptions,
) -> None:
    with pytest.raises(UsageError, match=r"not both|`resume` goes"):
        run("nowhere", options)
