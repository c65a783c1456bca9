"""Pooled embeddings, a row of the modulation table for each caption, and embedded guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.serving.requests import HostedModel, ImageRequest
from goc_deploy.serving.service import Service
from tests.clip_folder import clip, save_tokenizer
from tests.conftest import Command
from tests.pixart_reference import Feature, eager_latents, forward
from tests.pooled_family import FAMILY, NAME, POOLED, SPEC, random_state, state_of_rows
from tests.reference import relative_l2
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline
from tests.t5_folder import save_encoder

PLANS = ("none", "fora:2", "fora:3+gc:1.0")
SCALE = 3.0


def arrays(prompts: int, negatives: int = 1, seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shape = (SPEC.caption_tokens, SPEC.caption_channels)
    return {
        f"{negative}{name}": generator.standard_normal((count, *of)).astype(np.float32)
        for negative, count in (("", prompts), ("negative_", negatives))
        for name, of in (("prompt_embeds", shape), ("pooled_prompt_embeds", (POOLED,)))
    }


def exported(folder: Path, **options: Any) -> Path:
    torch.save({"state_dict": random_state()}, folder / "model.pth")
    more = {"num_heads": 4, "sampler": "dpm++", "steps": 6, "max_batch": 2, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, NAME, FAMILY)
        goc_deploy.export(folder / "model.pth", folder / "engine", model=NAME, **more)
    return folder / "engine"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooled")
    np.savez(folder / "captions.npz", **arrays(3, seed=9))
    plans = (*PLANS, "fora:2+goc")
    return exported(folder, plans=plans, captions=folder / "captions.npz", calibrate=2)


def expected(
    given: dict[str, np.ndarray], plan: Any, noise: np.ndarray, guidance: float
) -> np.ndarray:
    """Plain PyTorch on the conditional and then the unconditional rows."""
    count, negatives = len(noise), len(given["negative_prompt_embeds"])
    rows = [*range(count), *(count + i % negatives for i in range(count))]

    def of_rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([given[name], given[f"negative_{name}"]])[rows])

    state = state_of_rows(random_state(), of_rows("pooled_prompt_embeds"), guidance)
    captions = of_rows("prompt_embeds")

    def model(x: torch.Tensor, t: torch.Tensor, feature: Feature) -> torch.Tensor:
        return forward(state, SPEC, x, t, captions, torch.ones(captions.shape[:2]), feature)

    return eager_latents(model, plan.schedule, plan.sampler, noise, SCALE)


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_every_row_has_the_modulation_of_its_own_caption(
    engine: Path, plan: str, negatives: int
) -> None:
    given = arrays(2, negatives)
    noise = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with goc_deploy.load(engine, plan=plan) as pipe:
        embeds = prompt_embeds_from_arrays(given, pipe.spec, "given")
        found = pipe.generate(prompt_embeds=embeds, latents=noise, cfg_scale=SCALE, guidance=1.5)
        assert relative_l2(found.latents, expected(given, pipe.plan, noise, 1.5)) < 1e-4


@pytest.mark.parametrize("segments", [True, False])
def test_steps_that_share_launches_draw_the_same(
    engine: Path, tmp_path: Path, segments: bool
) -> None:
    copy = copy_with_engines(engine, tmp_path / "engine", "embedded", segments=segments)
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        embeds = prompt_embeds_from_arrays(arrays(2, 2), pipe.spec, "given")
        host = pipe.generate(prompt_embeds=embeds, seed=4).latents
    pipe, _ = stand_in_pipeline(copy, "fora:2")
    with pipe:
        for _ in range(3):  # a step is recorded after its first run
            device = pipe.generate(prompt_embeds=embeds, seed=4).latents
            assert relative_l2(device, host) < 1e-5


def test_stored_captions_keep_their_pooled_embeddings(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2+goc") as pipe:
        embeds = prompt_embeds_from_arrays(arrays(3, seed=9), pipe.spec, "given")
        stored = pipe.generate([2, 0], seed=4).latents
        given = pipe.generate([2, 0], prompt_embeds=embeds, seed=4).latents
        np.testing.assert_array_equal(given, stored)
        alone = pipe.generate([0], seed=4, first_image=1).latents
        np.testing.assert_allclose(alone[0], stored[1], rtol=1e-4, atol=1e-4)
        with pytest.raises(UsageError, match="x must hold prompt_embeds and pooled_prompt_embeds"):
            prompt_embeds_from_arrays({"prompt_embeds": embeds.prompts.embeds}, pipe.spec, "x")


def test_a_model_with_embedded_guidance_draws_without_unconditional_rows(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        pipe.warmup()
        usual = pipe.generate([2, 0], seed=4)
        assert (usual.report["cfg_scale"], usual.report["guidance"]) == (1.0, 3.5)
        same = pipe.generate([2, 0], seed=4, cfg_scale=1, guidance=np.float32(3.5))
        np.testing.assert_array_equal(same.latents, usual.latents)
        other = pipe.generate([2, 0], seed=4, guidance=1)
        assert relative_l2(other.latents, usual.latents) > 1e-3
        for wrong, message in (
            (-1, "guidance must be a number within 0..1000"),
            ([3.5, 1.0], "guidance must be one number for all images"),
        ):
            with pytest.raises(UsageError, match=message):
                pipe.generate([2, 0], guidance=wrong)  # type: ignore[arg-type]


def test_requests_of_other_embedded_guidance_do_not_share_a_batch(engine: Path) -> None:
    requests = [ImageRequest("engine", labels=[0], seed=4, guidance=scale) for scale in (None, 1.0)]
    with Service({"engine": HostedModel(engine, ("fora:2",))}) as service:
        together = [service.submit(request) for request in (*requests, *requests)]
        found = [future.result() for future in together]
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        for result, guidance in zip(found, (3.5, 1.0, 3.5, 1.0), strict=True):
            alone = pipe.generate([0], seed=4, guidance=guidance).latents
            assert relative_l2(result.latents, alone) < 1e-6


def test_embedded_guidance_is_refused_by_other_models(golden_engine: Path) -> None:
    with goc_deploy.load(golden_engine) as pipe:
        assert "guidance" not in pipe.generate([1]).report
        with pytest.raises(UsageError, match="for models that embed a guidance scale"):
            pipe.generate([1], guidance=3.5)


def test_the_command_line_gives_the_embedded_guidance(
    engine: Path, golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    latents, report = tmp_path / "latents.npy", tmp_path / "report.json"
    words = ["--plan", "fora:2", "--labels", "2,0", "--seed", "4", "--guidance", "1.5"]
    outputs = ["--latents-output", str(latents), "--report", str(report)]
    command("goc-run", str(engine), *words, *outputs)
    written = json.loads(report.read_text())
    assert (written["guidance"], written["cfg_scale"]) == (1.5, 1.0)
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        expected = pipe.generate([2, 0], seed=4, guidance=1.5).latents
    np.testing.assert_array_equal(np.load(latents), expected)
    refused = command("goc-run", str(golden_engine), "--guidance", "1.5", code=2)
    assert "--guidance is for models that embed a guidance scale" in refused.stderr


def test_prompts_are_encoded_by_a_clip_and_a_t5_on_every_backend(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    folder = tmp_path / "pipeline"
    save_encoder(folder / "text_encoder_2")
    save_tokenizer(folder / "tokenizer")
    clip("CLIPTextModel", hidden_size=POOLED, num_attention_heads=2).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    engine = exported(tmp_path, plans=("fora:2",), text_encoder=folder)
    prompts = ["a red three", "the blue seven", "a red three"]
    with goc_deploy.load(engine) as pipe:
        embeds = pipe.encode(prompts, ["a three"])
        assert embeds.prompts.pooled.shape == (3, POOLED)
        np.testing.assert_array_equal(embeds.prompts.pooled[0], embeds.prompts.pooled[2])
        assert relative_l2(embeds.prompts.pooled[1], embeds.prompts.pooled[0]) > 1e-3
        expected = pipe.generate(prompt_embeds=embeds, seed=3, cfg_scale=2).latents
        more = {"prompts": prompts, "negative_prompts": ["a three"], "seed": 3, "cfg_scale": 2}
        np.testing.assert_array_equal(pipe.generate(**more).latents, expected)
        assert len(pipe.generate([0, 15], seed=3).latents) == 2  # stored captions
    pipe, _ = stand_in_pipeline(copy_with_engines(engine, tmp_path / "gpu", "embedded"), "fora:2")
    with pipe:
        found = pipe.encode(prompts, ["a three"])
        assert relative_l2(found.table.pooled, embeds.table.pooled) < 1e-5
        assert relative_l2(pipe.generate(**more).latents, expected) < 1e-5
