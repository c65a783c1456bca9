"""A model that draws captions on TensorRT, on the stand-ins: what ONNX Runtime draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.captions import prompt_embeds_from_arrays
from goc_deploy.engine_keys import WEIGHT_MODES
from tests.pixart_reference import SPEC as TINY
from tests.pixart_reference import random_state
from tests.reference import relative_l2
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline

PLAN = "fora:2+gc:1.0"
SPEC = replace(TINY, hidden=64, heads=4, mlp_hidden=128, told_size=0)  # so wide that every address is aligned


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    torch.save({"state_dict": random_state(SPEC)}, folder / "model.pth")
    more = {"num_heads": 4, "sampler": "dpm++", "steps": 6, "max_batch": 2}
    goc_deploy.export(folder / "model.pth", folder / "engine", plans=[PLAN], **more)
    return folder / "engine"


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_captions_are_drawn_as_on_onnx_runtime(engine: Path, tmp_path: Path, weights: str, segments: bool) -> None:
    generator, shape = np.random.default_rng(1), (3, SPEC.caption_tokens, SPEC.caption_channels)
    embeds = generator.standard_normal(shape).astype(np.float32)
    mask = (np.arange(SPEC.caption_tokens) < np.array([[3], [7], [2]])).astype(np.int64)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    captions = prompt_embeds_from_arrays(
        dict(zip(names, (embeds[:2], mask[:2], embeds[2:], mask[2:]), strict=True)), SPEC, "given"
    )
    pipe, _ = stand_in_pipeline(copy_with_engines(engine, tmp_path / "engine", weights, segments=segments), PLAN)
    with goc_deploy.load(engine, backend="onnxruntime") as judge:
        for labels in ([0, 1], [1], [0, 1], [1]):  # launched, then replayed
            request = {"captions": captions, "seed": 2, "cfg_scale": 4.5}
            found, expected = (one.generate(labels, **request).latents for one in (pipe, judge))
            assert relative_l2(found, expected) < 1e-5
    assert pipe.plan.segment_signatures == (("w*6",) if segments else ())
