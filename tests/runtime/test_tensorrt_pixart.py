"""A model that draws captions on TensorRT, on the stand-ins: what ONNX Runtime draws."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import goc_deploy
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.engine_dir.keys import WEIGHT_MODES
from goc_deploy.exporters.companions.vae import VaeDecoder, vae_config
from tests.exporters.companions.test_vae import CONFIG as VAE
from tests.exporters.companions.test_vae import WEIGHTS as VAE_WEIGHTS
from tests.pixart_reference import SPEC as TINY
from tests.pixart_reference import random_state
from tests.reference import relative_l2
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline
from tests.t5_folder import save_encoder

PLAN = "fora:2+gc:1.0"
SPEC = replace(
    TINY, hidden=64, heads=4, mlp_hidden=128, told_size=0
)  # so wide that every address is aligned


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    torch.save({"state_dict": random_state(SPEC)}, folder / "model.pth")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save_file(VaeDecoder(vae_config(VAE, "")).state_dict(), folder / "vae" / VAE_WEIGHTS)
    companions = {"text_encoder": save_encoder(folder / "t5"), "vae": folder / "vae", "vae_tile": 6}
    more = {"num_heads": 4, "sampler": "dpm++", "steps": 6, "max_batch": 2, **companions}
    goc_deploy.export(folder / "model.pth", folder / "engine", plans=[PLAN], **more)
    return folder / "engine"


def given_captions() -> PromptEmbeds:
    """Two captions and one to draw away from."""
    generator, shape = np.random.default_rng(1), (3, SPEC.caption_tokens, SPEC.caption_channels)
    embeds = generator.standard_normal(shape).astype(np.float32)
    mask = (np.arange(SPEC.caption_tokens) < np.array([[3], [7], [2]])).astype(np.int64)
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    arrays = dict(zip(names, (embeds[:2], mask[:2], embeds[2:], mask[2:]), strict=True))
    return prompt_embeds_from_arrays(arrays, SPEC, "given")


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_captions_are_drawn_as_on_onnx_runtime(
    engine: Path, tmp_path: Path, weights: str, segments: bool
) -> None:
    captions = given_captions()
    pipe, _ = stand_in_pipeline(
        copy_with_engines(engine, tmp_path / "engine", weights, segments=segments), PLAN
    )
    with goc_deploy.load(engine, backend="onnxruntime") as judge:
        for labels in ([0, 1], [1], [0, 1], [1]):  # launched, then replayed
            request = {"prompt_embeds": captions, "seed": 2, "cfg_scale": 4.5}
            found, expected = (one.generate(labels, **request).latents for one in (pipe, judge))
            assert relative_l2(found, expected) < 1e-5
    assert pipe.plan.segment_signatures == (("w*6",) if segments else ())


def test_threads_encode_decode_and_sample_at_once(engine: Path, tmp_path: Path) -> None:
    """Each on its own stream: on one that is shared the stand-in refuses the second thread."""
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    directory = copy_with_engines(engine, tmp_path / "engine", "shared")
    pipe, _ = stand_in_pipeline(directory, PLAN, sessions=2, capacity=2**32)
    prompts = [["a red three", "the blue seven"], ["seven", "three"], ["a blue a"], ["the red the"]]

    def drawn(index: int) -> tuple[np.ndarray, np.ndarray]:
        result = pipe.generate(prompts=prompts[index], negative_prompts=[f"a {index}"], seed=index)
        assert result.images is not None
        return result.latents, result.images

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(drawn, range(4)))
    with goc_deploy.load(engine, backend="onnxruntime", plan=PLAN) as judge:
        for index, (latents, images) in enumerate(found):
            expected = judge.generate(
                prompts=prompts[index], negative_prompts=[f"a {index}"], seed=index
            )
            assert relative_l2(latents, expected.latents) < 1e-5
            assert expected.images is not None
            assert np.abs(images.astype(int) - expected.images).max() <= 1


def test_weights_of_a_fine_tune_are_loaded_beside_the_text_encoder_and_the_decoder(
    engine: Path, tmp_path: Path
) -> None:
    """Its export has neither, and no captions that stand for labels."""
    torch.save({"state_dict": random_state(SPEC, 7)}, tmp_path / "tuned.pth")
    more = {"num_heads": 4, "sampler": "dpm++", "steps": 6, "max_batch": 2}
    goc_deploy.export(tmp_path / "tuned.pth", tmp_path / "tuned", plans=[PLAN], **more)
    request = {"prompt_embeds": given_captions(), "seed": 2}
    with goc_deploy.load(tmp_path / "tuned", backend="onnxruntime", plan=PLAN) as judge:
        expected = judge.generate([0, 1], **request).latents
    on_cpu = goc_deploy.load(engine, backend="onnxruntime", plan=PLAN)
    on_gpu, _ = stand_in_pipeline(copy_with_engines(engine, tmp_path / "engine", "shared"), PLAN)
    for pipe in (on_cpu, on_gpu):
        before = pipe.generate([0], seed=1)
        pipe.load_weights(tmp_path / "tuned")
        assert relative_l2(pipe.generate([0, 1], **request).latents, expected) < 1e-5
        after = pipe.generate([0], seed=1)
        assert relative_l2(after.latents, before.latents) > 1e-3
        assert after.images is not None
        pipe.load_weights(engine)
        np.testing.assert_array_equal(pipe.generate([0], seed=1).latents, before.latents)
