"""Pipelines of diffusers with their own schedulers.

Exported folders draw what the pipelines draw, from the same noise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.api import load_plans
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import EngineDirError, ModelError
from goc_deploy.evaluation.collect import converged_pipeline
from goc_deploy.exporters.folders import read_scheduler
from goc_deploy.exporters.schedulers import prediction_of
from goc_deploy.options import EvalOptions
from goc_deploy.policies.grammar import parse_policy
from tests.conftest import Command
from tests.exporters.architectures.test_diffusers_folder import CONFIG, state
from tests.exporters.architectures.test_pixart import CONFIG as PIXART_CONFIG
from tests.exporters.architectures.test_pixart import arrays
from tests.reference import relative_l2

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")

STEPS, LABELS = 8, [3, 207]
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
# A DiTPipeline does not scale its noise, so schedulers that ask for that (Euler) are in the other
# list.
OF_DIT: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, **BETAS}),
    "ddim-trailing-v": (
        "DDIMScheduler",
        {
            "clip_sample": False,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            "beta_schedule": "scaled_linear",
        },
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
}
OF_PIXART: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-3-sample": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "prediction_type": "sample"},
    ),
    "euler": (
        "EulerDiscreteScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "unipc-flow": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "ddim-offset": (
        "DDIMScheduler",
        {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False},
    ),
}


def save_pipeline(folder: Path, name: str, transformer: Any, scheduler: Any) -> Path:
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def scheduler_of(kind: str, settings: dict[str, Any]) -> Any:
    return getattr(diffusers, kind)(**settings)


def _settings(scheduler: Any, path: Path) -> dict[str, Any]:
    path.write_text(scheduler.to_json_string())
    try:
        return read_scheduler(path)
    finally:
        path.unlink()


def with_scheduler(engine: Path, copy: Path, scheduler: Any, *specs: str, **more: Any) -> Path:
    """A copy of an engine directory as if its folder had come with another scheduler."""
    shutil.copytree(engine, copy)
    manifest, settings = read_manifest(engine), _settings(scheduler, copy / "scheduler.json")
    model = replace(manifest.model, prediction_type=prediction_of(settings, "here"))
    manifest = replace(manifest, model=model, scheduler=settings, plans=())
    (copy / MANIFEST_NAME).write_text(manifest_to_json(manifest))
    extra = 1 if "PNDM" in type(scheduler).__name__ else 0
    for spec in specs:
        steps = {} if spec.startswith("search") else {"steps": STEPS + extra}
        goc_deploy.add_plan(
            copy, spec, name=f"{parse_policy(spec).default_name}.theirs", **steps, **more
        )
    return copy


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random transformer of diffusers, and the engine of its pipeline's folder."""
    folder = tmp_path_factory.mktemp("dit")
    transformer = diffusers.DiTTransformer2DModel(
        **{k: v for k, v in CONFIG.items() if not k.startswith("_")}
    ).eval()
    transformer.load_state_dict(state(), strict=False)
    save_pipeline(folder / "model", "DiTPipeline", transformer, scheduler_of(*OF_DIT["ddim"]))
    manifest = goc_deploy.export(
        folder / "model", folder / "came", plans=("none",), steps=STEPS, max_batch=2
    )
    assert manifest.model.guided_channels == 4
    return transformer, folder / "came"


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The same of a PixArt."""
    pytest.importorskip(
        "transformers", reason="PixArtAlphaPipeline needs transformers, which is not installed"
    )
    folder = tmp_path_factory.mktemp("pixart")
    config = {k: v for k, v in PIXART_CONFIG.items() if not k.startswith("_")} | {
        "use_additional_conditions": False
    }
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(**config).eval()
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.15)
    save_pipeline(
        folder / "model", "PixArtAlphaPipeline", transformer, scheduler_of(*OF_PIXART["dpm"])
    )
    goc_deploy.export(folder / "model", folder / "came", plans=("none",), steps=STEPS, max_batch=2)
    return transformer, folder / "came"


@pytest.mark.parametrize("name", OF_DIT)
def test_a_dit_draws_what_its_pipeline_draws(
    dit: tuple[Any, Path], name: str, tmp_path: Path
) -> None:
    from benchmarks.diffusers_dit import KeepLatents

    transformer, engine = dit
    scheduler, vae = scheduler_of(*OF_DIT[name]), KeepLatents()
    if name != "ddim":  # which came with the folder
        engine = with_scheduler(engine, tmp_path / "engine", scheduler, "none")
    judge = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    judge.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    judge(
        LABELS,
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(4),
    )
    with goc_deploy.load(engine, plan="none" if engine.name == "came" else "none.theirs") as pipe:
        assert pipe.plan.sampler.sampler == "diffusers"
        found = pipe.generate(LABELS, cfg_scale=4.0, latents=noise.numpy())
    assert relative_l2(found.latents, vae.latents.numpy()) < 1e-5


@pytest.mark.parametrize("name", OF_PIXART)
def test_a_pixart_draws_what_its_pipeline_draws(
    pixart: tuple[Any, Path], name: str, tmp_path: Path
) -> None:
    from goc_deploy.conditions.captions import prompt_embeds_from_arrays

    transformer, engine = pixart
    scheduler = scheduler_of(*OF_PIXART[name])
    if name != "dpm":
        engine = with_scheduler(engine, tmp_path / "engine", scheduler, "none")
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
    )
    judge = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    judge.set_progress_bar_config(disable=True)
    given = arrays(read_manifest(engine).model)
    both = {
        key: np.repeat(value, 2, axis=0) if key.startswith("negative") else value
        for key, value in given.items()
    }
    noise = np.random.default_rng(5).standard_normal((2, 4, 8, 8)).astype(np.float32)
    expected = judge(
        **{key: torch.from_numpy(value) for key, value in both.items()},
        negative_prompt=None,
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        height=64,
        width=64,
        use_resolution_binning=False,
        latents=torch.from_numpy(noise),
        output_type="latent",
    ).images.numpy()
    with goc_deploy.load(engine, plan="none" if engine.name == "came" else "none.theirs") as pipe:
        captions = prompt_embeds_from_arrays(given, pipe.spec, "")
        found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5).latents
    assert relative_l2(found, expected) < 1e-5


def test_policies_that_learn_follow_the_folders_scheduler(
    dit: tuple[Any, Path], tmp_path: Path
) -> None:
    """Calibration, and trials of other step counts, run on probed tables.

    The tables reach back four steps.
    """
    specs = ("fora:2+goc", "fora:2+fit", "search:3,steps=6,reference=12")
    engine = with_scheduler(
        dit[1], tmp_path / "engine", scheduler_of(*OF_DIT["pndm"]), *specs, calibrate=2
    )
    with goc_deploy.load(engine, plan="fora-2+goc.theirs") as pipe:
        assert (pipe.plan.sampler.reach, pipe.plan.sampler.graph) == (4, "sampler_lag3")
        first, again = (pipe.generate([3], seed=seed).latents for seed in (0, 0))
        pipe.generate([3], seed=1)
        np.testing.assert_array_equal(first, again)


def test_a_converged_solution_follows_the_folders_scheduler(dit: tuple[Any, Path]) -> None:
    with ExitStack() as stack:
        pipes = load_plans(dit[1], ["none"], all_units=True)
        converged = converged_pipeline(stack, pipes, EvalOptions(converged=12))
        assert converged is not None
        assert (converged.plan.steps, converged.plan.sampler.sampler) == (12, "diffusers")
        pipes[0].close()


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "clip_sample": (
        lambda settings: settings.update(clip_sample=True),
        "DDIMScheduler has clip_sample True",
    ),
    "class": (
        lambda settings: settings.update(_class_name="HeunDiscreteScheduler"),
        "'HeunDiscreteScheduler', which is",
    ),
    "infinity": (
        lambda settings: settings.update(trained_betas=[-float("inf")]),
        "trained_betas is infinite",
    ),
    "prediction": (
        lambda settings: settings.update(prediction_type="score"),
        "prediction_type is 'score'",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_folder_whose_scheduler_is_no_table_is_refused(
    dit: tuple[Any, Path], tmp_path: Path, change: str
) -> None:
    alter, message = REFUSED[change]
    folder = save_pipeline(tmp_path / "m", "DiTPipeline", dit[0], scheduler_of(*OF_DIT["ddim"]))
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    alter(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=message):
        goc_deploy.export(folder, tmp_path / "engine", plans=("none",))
    assert not (tmp_path / "engine").exists()


def test_a_manifest_with_a_scheduler_that_is_no_object_is_refused(
    dit: tuple[Any, Path], tmp_path: Path
) -> None:
    found = json.loads((dit[1] / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**found, "scheduler": 3}))
    with pytest.raises(EngineDirError, match=r"\$\.scheduler: expected object \| null, got 3"):
        read_manifest(tmp_path)


def test_another_sampler_takes_the_place_of_the_folders(
    dit: tuple[Any, Path], tmp_path: Path, command: Command
) -> None:
    folder = save_pipeline(
        tmp_path / "m",
        "DiTPipeline",
        dit[0],
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
    )
    done = command(
        "goc-export", folder, "-o", tmp_path / "e", "--plan", "none", "--steps", 2, code=3
    )
    assert "clip_sample True, only False is supported; name another --sampler" in done.stderr
    command(
        "goc-export",
        folder,
        "-o",
        tmp_path / "e",
        "--plan",
        "none",
        "--steps",
        2,
        "--sampler",
        "dpm++",
    )
    manifest = read_manifest(tmp_path / "e")
    assert (manifest.model.prediction_type, manifest.scheduler is None) == ("v", False)
    done = command("goc-plan", tmp_path / "e", "fora:2", "--sampler", "diffusers", code=3)
    assert "clip_sample" in done.stderr
