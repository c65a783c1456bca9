"""PixArtSigmaPipeline of diffusers: its folder is exported, and draws what the pipeline draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.model_folder import read_model_folder
from tests.exporters.architectures.test_pixart import CONFIG
from tests.exporters.architectures.test_pixart_sigma import CHANGES, PLANS, SIDE, SPEC, long_arrays
from tests.exporters.test_pipeline_schedulers import with_scheduler
from tests.pixart_reference import Feature, eager_latents, forward, hook_units
from tests.reference import relative_l2
from tests.t5_folder import save_encoder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
transformers = pytest.importorskip(
    "transformers", reason="transformers comes with the judges extra"
)

STEPS, PIXELS = 8, 8 * SIDE
NOISE = np.random.default_rng(5).standard_normal((2, 4, SIDE, SIDE)).astype(np.float32)
PROMPTS = ["The red seven ", "a blue three" + 80 * " seven the"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random pipeline with the scheduler of the public ones, and its engine directory."""
    folder = tmp_path_factory.mktemp("sigma")
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        **{k: v for k, v in {**CONFIG, **CHANGES}.items() if not k.startswith("_")}
    ).eval()
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.15)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        force_upcast=True,
    ).eval()
    encoder = save_encoder(folder / "t5", vocab_size=160)  # with the 100 extra tokens of T5
    judge = diffusers.PixArtSigmaPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(encoder),
        text_encoder=transformers.T5EncoderModel.from_pretrained(encoder),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    judge.set_progress_bar_config(disable=True)
    judge.save_pretrained(folder / "model")
    manifest = goc_deploy.export(
        folder / "model",
        folder / "came",
        vae=folder / "model",
        text_encoder=folder / "model",
        plans=PLANS,
        steps=STEPS,
        max_batch=2,
    )
    assert manifest.model.architecture == "pixart-sigma"
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4
    return judge, folder / "came"


def drawn(judge: Any, output: str, **more: Any) -> np.ndarray:
    """What the pipeline draws; the judge repeats a negative caption by itself."""
    images: Any = judge(
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        height=PIXELS,
        width=PIXELS,
        use_resolution_binning=False,
        clean_caption=False,
        latents=torch.from_numpy(NOISE),
        output_type=output,
        **more,
    ).images
    return images.numpy() if output == "latent" else np.asarray(images)


def embeddings() -> dict[str, Any]:
    """The captions as arguments of the pipeline."""
    given = long_arrays()
    return {"negative_prompt": None} | {
        name: torch.from_numpy(np.repeat(value, 2, axis=0) if "negative" in name else value)
        for name, value in given.items()
    }


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_latents_are_those_of_the_pipeline(
    pipeline: tuple[Any, Path], name: str, tmp_path: Path
) -> None:
    judge, engine = pipeline
    plan, scheduler = "none", getattr(diffusers, name)()
    if name.startswith("Euler"):
        engine, plan = with_scheduler(engine, tmp_path / "e", scheduler, "none"), "none.theirs"
    parts = {**judge.components, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    other = diffusers.PixArtSigmaPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    expected = drawn(other, "latent", **embeddings())
    with goc_deploy.load(engine, plan=plan) as pipe:
        assert pipe.plan.sampler.sampler == "diffusers"
        captions = prompt_embeds_from_arrays(long_arrays(), pipe.spec, "")
        found = pipe.generate(prompt_embeds=captions, latents=NOISE, cfg_scale=4.5).latents
    # With sines of exact angles in place of float32's, the pipeline itself differs by 3e-5.
    assert relative_l2(found, expected) < 1e-4


def test_prompts_become_the_images_of_the_pipeline(pipeline: tuple[Any, Path]) -> None:
    """The second prompt has more tokens than an alpha takes."""
    judge, engine = pipeline
    assert 120 < judge.tokenizer(PROMPTS[1].lower(), return_tensors="pt").input_ids.shape[1] < 300
    call = {"prompt": PROMPTS, "negative_prompt": "blue"}
    with goc_deploy.load(engine, plan="none") as pipe:
        found = pipe.generate(
            prompts=PROMPTS, negative_prompts=["blue"] * 2, latents=NOISE, cfg_scale=4.5
        )
    assert relative_l2(found.latents, drawn(judge, "latent", **call)) < 1e-4
    assert found.images is not None
    assert np.abs(found.images - 255 * drawn(judge, "np", **call)).max() < 1


def test_units_and_cached_plans_are_those_of_the_blocks_of_diffusers(
    pipeline: tuple[Any, Path],
) -> None:
    judge, engine = pipeline
    given, rows = long_arrays(), [0, 1, 2, 2]
    embeds, mask = (
        torch.from_numpy(
            np.concatenate([given[f"prompt_{k}"], given[f"negative_prompt_{k}"]])[rows]
        )
        for k in ("embeds", "attention_mask")
    )
    hooked = hook_units(judge.transformer)

    def theirs(x: torch.Tensor, t: torch.Tensor, feature: Feature) -> torch.Tensor:
        hooked["feature"] = feature
        return judge.transformer(
            x, encoder_hidden_states=embeds, timestep=t, encoder_attention_mask=mask
        ).sample

    state = read_model_folder(engine.parent / "model", ARCHITECTURES).checkpoint.tensors
    x, t = torch.from_numpy(NOISE[[0, 1, 0, 1]]), torch.tensor([999.0, 7.0, 999.0, 7.0])
    kept: list[list[torch.Tensor]] = [[], []]

    def keep(features: list[torch.Tensor]) -> Feature:
        return lambda _unit, compute: features.append(compute()) or features[-1]

    with torch.inference_mode():
        expected = theirs(x, t, keep(kept[0]))
        found = forward(state, SPEC, x, t, embeds, mask, keep(kept[1]))
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-5
    assert len(kept[1]) == SPEC.units
    for mine, own in zip(kept[1], kept[0], strict=True):
        assert relative_l2(mine.numpy(), own.numpy()) < 1e-4

    for plan in PLANS:
        with goc_deploy.load(engine, plan=plan) as pipe:
            captions, compiled = prompt_embeds_from_arrays(given, pipe.spec, ""), pipe.plan
            latents = pipe.generate(prompt_embeds=captions, latents=NOISE, cfg_scale=4.5).latents
        eager = eager_latents(theirs, compiled.schedule, compiled.sampler, NOISE, 4.5)
        assert relative_l2(latents, eager) < 1e-4, plan
