"""FLUX.2: every unit is that of diffusers, and the steps of its pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.flux2 import (
    FAMILY,
    FLUX2,
    Flux2Config,
    spec_from_config,
    spec_of,
)
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.samplers.process import EVEN_SIGMAS, FITTED_SHIFT, Process
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.exporters.architectures.graph_chain import Arrays, GraphChain
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.sums import check_that_sums_take_the_place_of_features
from tests.exporters.architectures.test_flux import with_outputs
from tests.exporters.architectures.test_flux_images import cached_units
from tests.pixart_reference import Cache
from tests.reference import relative_l2

CONFIG: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 8, 6, 6),
}
SIZES = [(8, 12), (10, 6)]  # of the latents
TOKENS = 13
GUIDANCE, TIME, STEPS = 4.0, 700.0, 6
PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2", "fora:6")
IMAGES = [(96, 64), (48, 80)]  # width and height in pixels; the first one is the usual size
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def judge_of(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(**{**CONFIG, **changes}).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "attn.norm" in name else 0.0, 0.15)
    return model.requires_grad_(False)


def tiny(judge: Any) -> ModelSpec:
    """The model of a transformer of diffusers, for captions of few tokens."""
    spec = spec_from_config(json.loads(judge.to_json_string()), "here")
    return replace(spec, caption_tokens=TOKENS, grid=(4, 6), max_grid=(6, 6))


def conditions(spec: ModelSpec) -> Arrays:
    captions = np.random.default_rng(1).standard_normal((2, TOKENS, spec.caption_channels))
    guidance = np.array([GUIDANCE], np.float32)
    return {"captions": captions.astype(np.float32), "guidance": guidance}


def patchified(latents: np.ndarray) -> torch.Tensor:
    """Latents (B, C, H, W) as Flux2Pipeline keeps them: (B, 4 * C, H / 2, W / 2)."""
    patches: torch.Tensor = diffusers.Flux2KleinPipeline._patchify_latents(
        torch.from_numpy(latents)
    )
    return patches


def predicted(judge: Any, latents: np.ndarray, given: Arrays) -> torch.Tensor:
    """The prediction of diffusers, (B, T, 4 * C)."""
    pipeline, patches = diffusers.Flux2KleinPipeline, patchified(latents)
    captions = torch.from_numpy(given["captions"])
    guided = judge.config.guidance_embeds
    output: torch.Tensor = judge(
        hidden_states=pipeline._pack_latents(patches),
        encoder_hidden_states=captions,
        timestep=torch.full((2,), TIME / 1000),
        img_ids=pipeline._prepare_latent_ids(patches),
        txt_ids=pipeline._prepare_text_ids(captions),
        guidance=torch.full((2,), GUIDANCE) if guided else None,
    ).sample
    return output


def expected_of_units(seen: dict[str, Any]) -> list[tuple[str, str, torch.Tensor]]:
    """(unit, output, tensor) of diffusers, for 2 double and 3 single blocks."""
    expected = []
    for i in range(2):
        name, block = f"transformer_blocks.{i}", f"block_{i:02d}"
        image, text = seen[f"{name}.attn"]
        expected += [
            (f"{block}_attn", "feature", image),
            (f"{block}_attn", "feature_text", text),
            (f"{block}_mlp", "feature", seen[f"{name}.ff"]),
            (f"{block}_mlp", "feature_text", seen[f"{name}.ff_context"]),
            (f"{block}_mlp", "text_out", seen[name][0]),
            (f"{block}_mlp", "x_out", seen[name][1]),
        ]
    for i in range(3):
        name, unit = f"single_transformer_blocks.{i}", f"block_{i + 2:02d}_single"
        both, joint = seen[f"{name}.attn"], seen[name]
        expected += [(unit, "feature", both[:, TOKENS:]), (unit, "x_out", joint[:, TOKENS:])]
        if i < 2:
            expected += [
                (unit, "feature_text", both[:, :TOKENS]),
                (unit, "text_out", joint[:, :TOKENS]),
            ]
    return expected


@pytest.fixture(scope="module", params=[False, True], ids=["klein", "dev"])
def chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, GraphChain]:
    judge = judge_of(guidance_embeds=request.param)
    folder = tmp_path_factory.mktemp("flux2")
    return judge, GraphChain(FLUX2, tiny(judge), judge.state_dict(), folder)


@pytest.mark.parametrize("size", SIZES)
def test_every_unit_is_that_of_diffusers(
    chain: tuple[Any, GraphChain], size: tuple[int, int]
) -> None:
    judge, graphs = chain
    noise = np.random.default_rng(2).standard_normal((2, 3, *size)).astype(np.float32)
    given = conditions(graphs.spec)
    output, seen = with_outputs(judge, lambda: predicted(judge, noise, given))
    found = graphs.step(noise, TIME, given)
    for unit, name, tensor in expected_of_units(seen):
        theirs = tensor.numpy().reshape(found[unit][name].shape)
        assert relative_l2(found[unit][name], theirs) < 1e-4, (unit, name)
    ours = patchified(found["final"]["prediction"]).flatten(2).transpose(1, 2)
    assert relative_l2(ours.numpy(), output.numpy()) < 1e-4
    assert relative_l2(graphs.collapsed(found), found["final"]["prediction"]) < 1e-6


def guided_latents(
    judge: Any, noise: np.ndarray, given: dict[str, np.ndarray], schedule: Schedule
) -> np.ndarray:
    """The final latents of Flux2KleinPipeline, of whose features a schedule replaces some."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    mu = compute_empirical_mu(image_seq_len=noise[0, 0].size // 4, num_steps=STEPS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
    pipeline, patches = diffusers.Flux2KleinPipeline, patchified(noise)
    x = pipeline._pack_latents(patches)
    negative = given["negative_prompt_embeds"].repeat(len(x), axis=0)
    captions = torch.from_numpy(np.concatenate([given["prompt_embeds"], negative]))
    caches = {part: Cache(schedule) for part in ("image", "text")}
    with cached_units(
        judge, lambda part, unit, compute: caches[part](unit, compute), TOKENS, "attn"
    ):
        for step, t in enumerate(scheduler.timesteps):
            for cache in caches.values():
                cache.step = step
            cond, uncond = judge(
                hidden_states=torch.cat([x, x]),
                encoder_hidden_states=captions,
                timestep=(t / 1000).expand(2 * len(x)),
                img_ids=pipeline._prepare_latent_ids(torch.cat([patches, patches])),
                txt_ids=pipeline._prepare_text_ids(captions),
            ).sample.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    whole = x.transpose(1, 2).reshape(patches.shape)
    latents: np.ndarray = pipeline._unpatchify_latents(whole).numpy()
    return latents


@pytest.fixture(scope="module")
def judge() -> Any:
    return judge_of()


@pytest.fixture(scope="module")
def engine(judge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("klein")
    judge.save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    goc_deploy.export(
        folder, folder / "engine", plans=PLANS, steps=STEPS, max_batch=2, size=IMAGES[0],
        max_size=(96, 96), caption_tokens=TOKENS,
    )  # fmt: skip
    return folder / "engine"


def arrays() -> dict[str, np.ndarray]:
    """Two captions and a negative one."""
    draw = np.random.default_rng(1).standard_normal
    return {
        name: draw((count, TOKENS, 20)).astype(np.float32)
        for name, count in (("prompt_embeds", 2), ("negative_prompt_embeds", 1))
    }


@pytest.mark.parametrize("plan", PLANS)
def test_the_loop_of_the_pipeline_is_followed_at_two_sizes(
    judge: Any, engine: Path, plan: str
) -> None:
    """Without a cache, and with one in hooked blocks."""
    with goc_deploy.load(engine, plan=plan) as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        for size in IMAGES:
            shape = (2, 3, size[1] // 8, size[0] // 8)
            noise = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
            found = pipe.generate(
                prompt_embeds=embeds, latents=noise, size=size, cfg_scale=GUIDANCE
            ).latents
            expected = guided_latents(judge, noise, arrays(), pipe.plan.schedule)
            assert relative_l2(found, expected) < 1e-4


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_sums_take_the_place_of_features(engine: Path, plan: str) -> None:
    check_that_sums_take_the_place_of_features(
        engine,
        plan,
        lambda spec: {
            "prompt_embeds": prompt_embeds_from_arrays(arrays(), spec, ""),
            "size": (48, 80),
        },
    )


def test_a_collapsed_step_reads_no_text(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:6", max_sessions=1) as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=embeds)


def test_blocks_share_their_modulation(chain: tuple[Any, GraphChain]) -> None:
    _, graphs = chain
    (weight,) = [
        parameter
        for entry in graphs.entries
        for parameter in entry.parameters
        if parameter.name == "modulation.weight"
    ]
    assert weight.shape[0] == (6 + 6 + 3 + 2) * graphs.spec.hidden


def test_public_models_have_the_sizes_of_their_pages() -> None:
    klein = spec_of(
        Flux2Config(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False,
        )
    )  # fmt: skip
    assert (klein.hidden, klein.units, klein.channels, klein.tokens) == (3072, 30, 32, 4096)
    count = sum(np.prod(shape) for shape in FAMILY.shapes(klein).values())
    assert round(count / 1e9, 3) == 3.876
    assert spec_of(Flux2Config()).embedded_guidance


@pytest.mark.parametrize("tokens", [4096, 1504, 9216])
@pytest.mark.parametrize("steps", [4, 10, 28, 50])
def test_steps_are_those_of_the_pipeline(steps: int, tokens: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    told = {EVEN_SIGMAS: True, FITTED_SHIFT: True, "_class_name": type(scheduler).__name__}
    tables = [
        table_from_sampler("diffusers", steps, Process("flow_to_noise", {**DYNAMIC, **told}, size))
        for size in (tokens, 777)
    ]
    for table in (tables[0], tables[1].at(tokens)):
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=0, atol=2e-4)


def test_folders_and_files_are_recognised(tmp_path: Path) -> None:
    judge = judge_of(attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(32,) * 4)
    judge.save_pretrained(tmp_path / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(
        tmp_path / "scheduler"
    )
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    model = read_model_folder(tmp_path, {"flux2": FLUX2})
    assert model.scheduler is not None
    assert model.scheduler[FITTED_SHIFT] is model.scheduler[EVEN_SIGMAS] is True
    state = judge.state_dict()
    assert FLUX2.matches(list(state))
    assert FLUX2.spec_from_tensors(state, None) == model.spec
    FLUX2.check_tensors(state, model.spec)
    with pytest.raises(ModelError, match="heads of 24; heads of 128 are supported in a file"):
        FLUX2.spec_from_tensors(judge_of().state_dict(), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out_channels": 8}, "in_channels is 12 and out_channels 8, only equal"),
        ({"mlp_ratio": 4.0}, "mlp_ratio is 4.0, only 3.0 is supported"),
        ({"axes_dims_rope": [4, 8, 6, 8]}, r"axes_dims_rope is \[4, 8, 6, 8\], attention_head"),
        ({"colour": 1}, "a setting 'colour' that this version does not know"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    config = {**CONFIG, "_class_name": "Flux2Transformer2DModel", **values}
    with pytest.raises(ModelError, match=message):
        spec_from_config(config, "config.json")


def test_fp16_is_refused() -> None:
    with pytest.raises(UsageError, match="exceed the range of fp16; use bf16 or fp32"):
        FLUX2.graph_kinds(spec_of(Flux2Config()), "fp16")
