"""PixArt: the same latents as plain PyTorch and as diffusers, and refusals by name.

Each is tested with and without a cache.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import goc_deploy
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures import pixart
from goc_deploy.exporters.architectures.pixart_diffusers import layer_names
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.options import default_plans
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.pixart_reference import (
    SPEC,
    Feature,
    eager_latents,
    forward,
    hook_units,
    random_state,
)
from tests.reference import relative_l2

STEPS = 6
PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:2+goc")
CONFIG = {
    "_class_name": "PixArtTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "attention_type": "default",
    "caption_channels": 20,
    "cross_attention_dim": 48,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale": None,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 3,
    "num_embeds_ada_norm": 1000,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
    "use_additional_conditions": True,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def arrays(spec: ModelSpec, prompts: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Random captions of several lengths, and a short negative one."""
    generator = np.random.default_rng(seed)
    shape = (spec.caption_tokens, spec.caption_channels)
    lengths = np.arange(prompts)[:, None] % 4 + 3
    return {
        "prompt_embeds": generator.standard_normal((prompts, *shape)).astype(np.float32),
        "prompt_attention_mask": (np.arange(spec.caption_tokens) < lengths).astype(np.int64),
        "negative_prompt_embeds": generator.standard_normal((1, *shape)).astype(np.float32),
        "negative_prompt_attention_mask": (np.arange(spec.caption_tokens) < 2).astype(np.int64)[
            None
        ],
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as the public training code saves it."""
    path = tmp_path_factory.mktemp("pixart") / "PixArt-tiny.pth"
    torch.save({"state_dict": random_state()}, path)
    return path


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Path:
    """The model with captions to calibrate on, and a plan that was calibrated on them."""
    np.savez(checkpoint.parent / "captions.npz", **arrays(SPEC, 3, seed=9))
    output = checkpoint.parent / "engine"
    captions = checkpoint.parent / "captions.npz"
    more = {
        "num_heads": 3,
        "sampler": "dpm++",
        "steps": STEPS,
        "max_batch": 2,
        "calibrate": 2,
        "cfg_scale": 4.5,
    }
    manifest = goc_deploy.export(checkpoint, output, plans=PLANS, captions=captions, **more)
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4
    assert manifest.model.choices == 3
    return output


def model_of(
    state: dict[str, torch.Tensor], given: dict[str, np.ndarray], spec: ModelSpec = SPEC
) -> Any:
    """Plain PyTorch on the rows of a guided batch."""
    count = len(given["prompt_embeds"])
    rows = [*range(count), *[count] * count]
    captions = torch.from_numpy(
        np.concatenate([given["prompt_embeds"], given["negative_prompt_embeds"]])[rows]
    )
    masks = [given["prompt_attention_mask"], given["negative_prompt_attention_mask"]]
    mask = torch.from_numpy(np.concatenate(masks)[rows])

    def run(x: torch.Tensor, t: torch.Tensor, feature: Feature) -> torch.Tensor:
        return forward(state, spec, x, t, captions, mask, feature)

    return run


@pytest.mark.parametrize("plan", PLANS)
def test_a_checkpoint_draws_what_pytorch_draws(engine: Path, plan: str) -> None:
    given = arrays(SPEC)
    noise = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with goc_deploy.load(engine, plan=plan) as pipe:
        spec, compiled = pipe.spec, pipe.plan
        captions = prompt_embeds_from_arrays(given, spec, "given")
        found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5)
    expected = eager_latents(
        model_of(random_state(), given), compiled.schedule, compiled.sampler, noise, 4.5
    )
    assert relative_l2(found.latents, expected) < 1e-4
    assert found.report["cfg_channels"] == 4


def test_the_cache_has_three_units_per_block(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        report = pipe.generate([0, 1, 2], cfg_scale=4.5).report
    assert (report["computed_units"], report["all_units"]) == (3 * 6, 6 * 6)
    assert report["step_kinds"] == {"collapsed": 3, "full": 3}


def test_a_collapsed_step_reads_no_captions(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:6", max_sessions=1) as pipe:
        captions = prompt_embeds_from_arrays(arrays(SPEC), pipe.spec, "given")
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=captions)


def test_stored_captions_stand_for_labels(engine: Path) -> None:
    given = arrays(SPEC, 3, seed=9)
    with goc_deploy.load(engine, plan="none") as pipe:
        stored = pipe.generate([2, 0], seed=4).latents
        captions = prompt_embeds_from_arrays(given, pipe.spec, "given")
        np.testing.assert_array_equal(
            pipe.generate([2, 0], prompt_embeds=captions, seed=4).latents, stored
        )
        unguided = pipe.generate([2, 0], seed=4, cfg_scale=1).latents
        del given["negative_prompt_embeds"], given["negative_prompt_attention_mask"]
        alone = prompt_embeds_from_arrays(given, pipe.spec, "given")
        np.testing.assert_allclose(
            pipe.generate([2, 0], prompt_embeds=alone, seed=4, cfg_scale=1).latents, unguided
        )
        with pytest.raises(UsageError, match="guidance needs negative_prompt_embeds too"):
            pipe.generate(prompt_embeds=alone)
        with pytest.raises(
            UsageError, match=r"label 3 \(image 1\) must be a whole number within 0..2"
        ):
            pipe.generate([0, 3])


def test_requests_of_other_seeds_and_scales_share_a_batch(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        together = pipe.generate([2, 0], seed=[4, 9], cfg_scale=[1.0, 4.5]).latents
        for image, (label, seed, scale) in enumerate(((2, 4, 1.0), (0, 9, 4.5))):
            alone = pipe.generate([label], seed=seed, cfg_scale=scale).latents
            assert relative_l2(together[image : image + 1], alone) < 1e-6


def test_an_image_does_not_depend_on_its_neighbours_or_on_padding(engine: Path) -> None:
    given = arrays(SPEC, 3)
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        together = pipe.generate(
            prompt_embeds=prompt_embeds_from_arrays(given, pipe.spec, ""), seed=1
        ).latents
        cut = {name: value[:, :7] for name, value in given.items()}
        short = pipe.generate(
            [2], prompt_embeds=prompt_embeds_from_arrays(cut, pipe.spec, ""), seed=1, first_image=2
        ).latents
    np.testing.assert_allclose(short[0], together[2], rtol=1e-4, atol=1e-4)


def save_folder(
    folder: Path, state: dict[str, torch.Tensor], spec: ModelSpec, **changes: Any
) -> None:
    """The model as diffusers saves it, under its names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    there = {}
    for new, old in layer_names(spec).items():
        there |= {f"{old}.{kind}": state[f"{new}.{kind}"] for kind in ("weight", "bias")}
    there["scale_shift_table"] = state["final_layer.scale_shift_table"]
    for block in range(spec.depth):
        here, old = f"blocks.{block}", f"transformer_blocks.{block}"
        there[f"{old}.scale_shift_table"] = state[f"{here}.scale_shift_table"]
        for kind in ("weight", "bias"):
            for name, parts in (
                (f"{here}.attn.qkv", "attn1:qkv"),
                (f"{here}.cross_attn.kv_linear", "attn2:kv"),
            ):
                layer, letters = parts.split(":")
                chunks = state[f"{name}.{kind}"].chunk(len(letters))
                there |= {
                    f"{old}.{layer}.to_{c}.{kind}": part
                    for c, part in zip(letters, chunks, strict=True)
                }
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in there.items()}, folder / WEIGHTS
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline" / "transformer"
    save_folder(path, random_state(), SPEC)
    (tmp_path / "pipeline" / "model_index.json").write_text(
        '{"_class_name": "PixArtAlphaPipeline"}'
    )
    return path


@pytest.mark.parametrize("old", [False, True])
def test_folders_and_checkpoints_hold_the_same_model(folder: Path, old: bool) -> None:
    if old:
        save_folder(folder, random_state(), SPEC, _class_name="Transformer2DModel")
    found = read_model_folder(folder.parent, {"pixart": pixart.PIXART})
    expected = pixart.spec_from_tensors(random_state(), 3)
    assert found.spec.caption_tokens == 120  # which a configuration does not say
    assert {**_fields(found.spec), "caption_tokens": 11} == _fields(expected)
    state = random_state()
    assert found.checkpoint.tensors.keys() == state.keys() - {pixart.NULL_CAPTION}
    for name, tensor in found.checkpoint.tensors.items():
        assert torch.equal(tensor, state[name]), name


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def test_large_latents_stretch_positions_and_are_told_their_size() -> None:
    told = pixart.spec_from_config(
        {**CONFIG, "sample_size": 128, "use_additional_conditions": None}, ""
    )
    assert (told.told_size, told.tokens) == (1024, 64 * 64)
    assert (
        pixart.spec_from_config(
            {**CONFIG, "sample_size": 64, "use_additional_conditions": None}, ""
        ).told_size
        == 0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": 1}, "setting 'rope' that this version does not know"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, only 1e-06 is supported"),
        ({"caption_channels": None}, r"\$\.caption_channels: expected int, got None"),
        (
            {"cross_attention_dim": 64},
            "cross_attention_dim is 64, only 48 is supported for a width of 48",
        ),
        ({"out_channels": 5}, r"out_channels is 5, expected 4 or 8 \(with sigma\)"),
        (
            {"interpolation_scale": 3},
            "interpolation_scale is 3, only 1 is supported for .* sample_size 8",
        ),
        (
            {"use_additional_conditions": "yes"},
            r"\$\.use_additional_conditions: expected bool \| null, got 'yes'",
        ),
        ({"sample_size": 9}, "sample_size must be a multiple of patch_size, got 9 and 2"),
        ({"sample_size": 8000}, "sample_size is 8000, at most 512 is supported"),
        ({"attention_head_dim": 20}, "3 heads of 20 .* must be a multiple of 12|cross_attention"),
        ({"num_layers": 1001}, "num_layers is 1001, at most 1000"),
        (
            {"use_additional_conditions": False},
            "unexpected: adaln_single.emb.aspect_ratio_embedder",
        ),
        ({"num_layers": 3}, "missing: transformer_blocks.2"),
        ({"num_layers": 1}, "unexpected: transformer_blocks.1"),
        (
            {"caption_channels": 24},
            "of another shape: y_embedder.y_proj.fc1.weight .48, 20., expected .48, 24.",
        ),
        ({"norm_type": "layer_norm"}, "_class_name|norm_type is 'layer_norm'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ModelError, match=message):
        read_and_check(folder)


def read_and_check(folder: Path) -> None:
    found = read_model_folder(folder, {"pixart": pixart.PIXART})
    pixart.check_tensors(found.checkpoint.tensors, found.spec)


def test_a_checkpoint_that_does_not_fit_itself_is_refused() -> None:
    state = random_state()
    with pytest.raises(
        ModelError,
        match="the width 48 does not tell the number of attention heads; give `num_heads`",
    ):
        pixart.spec_from_tensors(state, None)
    with pytest.raises(ModelError, match=r"has no position table .pos_embed., so the size"):
        pixart.spec_from_tensors({k: v for k, v in state.items() if k != "pos_embed"}, 3)
    with pytest.raises(ModelError, match="the checkpoint has 15 tokens"):
        pixart.spec_from_tensors({**state, "pos_embed": torch.zeros(1, 15, 48)}, 3)
    odd = {k: v for k, v in state.items() if k != "blocks.1.cross_attn.proj.bias"} | {
        "blocks.1.norm": torch.zeros(1)
    }
    with pytest.raises(
        ModelError, match=r"1 missing: blocks.1.cross_attn.proj.bias; 1 unexpected: blocks.1.norm"
    ):
        pixart.check_tensors(odd, SPEC)


def test_the_command_line_draws_captions(
    engine: Path, checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "x.npy"
    given = arrays(SPEC, 2)
    np.savez(tmp_path / "e.npz", **given)
    save_file(
        {name: torch.from_numpy(value) for name, value in given.items()}, tmp_path / "e.safetensors"
    )
    with goc_deploy.load(engine, plan="none") as pipe:
        captions = prompt_embeds_from_arrays(given, pipe.spec, "")
        expected = pipe.generate([0, 1, 0], prompt_embeds=captions, seed=2, cfg_scale=4.5).latents
    more = ("--plan", "none", "--seed", 2, "--cfg-scale", 4.5, "--latents-output", out)
    for name in ("e.npz", "e.safetensors"):
        command("goc-run", engine, "--prompt-embeds", tmp_path / name, "--num-images", 3, *more)
        np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    command("goc-run", engine, "--labels", "2,2", *more)
    np.savez(tmp_path / "wide.npz", prompt_embeds=np.zeros((1, 4, 21), np.float32))
    done = command("goc-run", engine, "--prompt-embeds", tmp_path / "wide.npz", code=2)
    assert (
        "has embeddings of width 21 but the model takes 20; use its own text encoder" in done.stderr
    )
    np.savez(tmp_path / "long.npz", prompt_embeds=np.zeros((1, 12, 20), np.float32))
    done = command("goc-run", engine, "--prompt-embeds", tmp_path / "long.npz", code=2)
    assert "has 12 tokens but the model takes 11" in done.stderr
    bare = tmp_path / "bare"
    done = command(
        "goc-export", checkpoint, "-o", bare, "--num-heads", 3, "--plan", "fora:2+goc", code=2
    )
    assert "there are no captions; add --captions" in done.stderr
    assert not bare.exists()
    done = command(
        "goc-eval", engine, "--num-images", 3, "--json", tmp_path / "eval.json", "--converged", 8
    )
    found = json.loads((tmp_path / "eval.json").read_text())["plans"]
    assert found["fora-2"]["metrics"]["relative_l2"]["value"] > 0
    assert found["none"]["metrics"]["converged_relative_l2"]["value"] > 0
    command("goc-bench", engine, "--plan", "none", "--labels", "0,1", "--repeats", 1)


def test_an_engine_without_captions_says_so(engine: Path, tmp_path: Path) -> None:
    bare = tmp_path / "engine"
    shutil.copytree(engine, bare)
    found = json.loads((bare / "manifest.json").read_text())
    model = {**found["model"], "choices": 0}
    (bare / "manifest.json").write_text(
        json.dumps({**found, "stored_captions": None, "model": model})
    )
    with goc_deploy.load(bare, plan="none") as pipe:
        pipe.warmup()
        with pytest.raises(
            UsageError,
            match="the engine directory keeps no captions to take instead of class labels",
        ):
            pipe.generate([0])
    for use in ("fora:3+goc", "search:2"):
        with pytest.raises(UsageError, match="keeps no captions"):
            goc_deploy.add_plan(bare, use)
    assert default_plans(calibrates=False) == ("none", "fora:2+gc:0.5")


def test_damaged_captions_are_refused(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    from goc_deploy.conditions.stored_captions import captions_from_bytes
    from goc_deploy.engine_dir.reading import read_manifest
    from goc_deploy.errors import EngineDirError

    spec = read_manifest(engine).model
    content = (engine / "captions" / "captions.npz").read_bytes()
    assert len(captions_from_bytes(memoryview(content), spec, "x").prompts) == 3
    for damaged in (b"", content[:-40], b"PK\x03\x04"):
        with pytest.raises(EngineDirError, match="x holds no captions for this model"):
            captions_from_bytes(memoryview(damaged), spec, "x")
    given = arrays(SPEC)
    del given["negative_prompt_embeds"], given["negative_prompt_attention_mask"]
    np.savez(tmp_path / "c.npz", **given)
    with pytest.raises(UsageError, match="has no negative_prompt_embeds, the caption of nothing"):
        goc_deploy.export(checkpoint, tmp_path / "e", num_heads=3, captions=tmp_path / "c.npz")


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_a_folder_draws_what_diffusers_draws(tmp_path: Path) -> None:
    """A random model, saved by diffusers, with its own DPM-Solver++.

    Its blocks are hooked to cache.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")}
    judge = diffusers.PixArtTransformer2DModel(**config).eval()
    for parameter in judge.parameters():
        parameter.data.normal_(0, 0.15)
    judge.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert (tmp_path / "transformer" / f"{WEIGHTS}.index.json").exists()
    plans = ["none", "fora:2", "fora:2+gc:1.0"]
    manifest = goc_deploy.export(
        tmp_path / "transformer",
        tmp_path / "engine",
        plans=plans,
        sampler="dpm++",
        steps=STEPS,
        max_batch=2,
    )
    spec = manifest.model
    given, noise = (
        arrays(spec),
        np.random.default_rng(5).standard_normal((2, 4, 8, 8)).astype(np.float32),
    )
    rows = [0, 1, 2, 2]
    both = {
        kind: np.concatenate([given[f"prompt_{kind}"], given[f"negative_prompt_{kind}"]])[rows]
        for kind in ("embeds", "attention_mask")
    }
    size = {"resolution": torch.full((4, 2), 64.0), "aspect_ratio": torch.ones(4, 1)}
    hooked = hook_units(judge)

    def run(x: torch.Tensor, t: torch.Tensor, feature: Feature) -> torch.Tensor:
        hooked["feature"] = feature
        return judge(
            x,
            encoder_hidden_states=torch.from_numpy(both["embeds"]),
            timestep=t,
            encoder_attention_mask=torch.from_numpy(both["attention_mask"]),
            added_cond_kwargs=size,
        ).sample

    for plan in plans:
        compiled = EngineDir(tmp_path / "engine", manifest).plan(plan)
        with goc_deploy.load(tmp_path / "engine", plan=plan) as pipe:
            captions = prompt_embeds_from_arrays(given, spec, "")
            found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5).latents
        expected = eager_latents(
            run, compiled.schedule, sampler_table("dpm++", STEPS, Process("eps")), noise, 4.5
        )
        assert relative_l2(found, expected) < 1e-4, plan
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(noise)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            cond, uncond = run(torch.cat([x, x]), t.expand(4), lambda _unit, compute: compute())[
                :, :4
            ].chunk(2)
            x = scheduler.step(uncond + 4.5 * (cond - uncond), t, x).prev_sample
    with goc_deploy.load(tmp_path / "engine", plan="none") as pipe:
        found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5).latents
    assert relative_l2(found, x.numpy()) < 1e-3


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize(("height", "width"), [(12, 6), (8, 8), (4, 18)])
def test_other_sizes_are_those_of_diffusers(
    any_size: tuple[Any, Path], height: int, width: int
) -> None:
    """A rectangular image, whose positions are interpolated and whose size the model is told."""
    judge, engine = any_size
    shape = (1, 4, height, width)
    noise = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    with goc_deploy.load(engine, plan="none") as pipe:
        given = arrays(pipe.spec, prompts=1)
        captions = prompt_embeds_from_arrays(given, pipe.spec, "")
        found = pipe.generate(
            prompt_embeds=captions, latents=noise, size=(width, height), cfg_scale=1.0
        ).latents
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    size = {
        "resolution": torch.tensor([[8.0 * height, 8.0 * width]]),
        "aspect_ratio": torch.tensor([[height / width]]),
    }

    def run(x: torch.Tensor, t: torch.Tensor, _feature: Feature) -> torch.Tensor:
        row = judge(
            x[:1],
            encoder_hidden_states=torch.from_numpy(given["prompt_embeds"]),
            timestep=t[:1],
            encoder_attention_mask=torch.from_numpy(given["prompt_attention_mask"]),
            added_cond_kwargs=size,
        ).sample
        return torch.cat([row, row])

    assert relative_l2(found, eager_latents(run, schedule, table, noise, 1.0)) < 1e-4


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model of diffusers that is told sizes, and its engine directory for any size."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    folder = tmp_path_factory.mktemp("any_size")
    torch.manual_seed(0)
    judge = diffusers.PixArtTransformer2DModel(
        **{k: v for k, v in CONFIG.items() if not k.startswith("_")}
    ).eval()
    for parameter in judge.parameters():
        parameter.data.normal_(0, 0.15)
    judge.save_pretrained(folder / "transformer")
    more = {"sampler": "dpm++", "steps": STEPS, "max_batch": 1, "max_size": (12, 8)}
    goc_deploy.export(folder / "transformer", folder / "engine", plans=["none"], **more)
    return judge, folder / "engine"


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves
def test_images_are_those_of_the_pipeline_of_diffusers(tmp_path: Path) -> None:
    """PixArtAlphaPipeline with supplied embeddings and a random VAE, from its folder to pixels."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    pytest.importorskip(
        "transformers", reason="PixArtAlphaPipeline needs transformers, which is not installed"
    )
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")} | {
        "use_additional_conditions": False
    }
    transformer = diffusers.PixArtTransformer2DModel(**config).eval()
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.15)
    levels = 4
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=4,
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    judge = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    judge.set_progress_bar_config(disable=True)
    judge.save_pretrained(tmp_path / "pipeline")
    manifest = goc_deploy.export(
        tmp_path / "pipeline",
        tmp_path / "engine",
        vae=tmp_path / "pipeline",
        plans=["none"],
        sampler="dpm++",
        steps=STEPS,
        max_batch=2,
    )
    given = arrays(manifest.model)
    negative = {
        name: np.repeat(value, 2, axis=0)
        for name, value in given.items()
        if name.startswith("negative")
    }
    noise = np.random.default_rng(5).standard_normal((2, 4, 8, 8)).astype(np.float32)
    call = {
        **{name: torch.from_numpy(value) for name, value in {**given, **negative}.items()},
        "negative_prompt": None,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.5,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "latents": torch.from_numpy(noise),
    }
    latents = judge(**call, output_type="latent").images.numpy()
    images = judge(**call, output_type="np").images
    with goc_deploy.load(tmp_path / "engine") as pipe:
        captions = prompt_embeds_from_arrays(given, pipe.spec, "")
        found = pipe.generate(prompt_embeds=captions, latents=noise, cfg_scale=4.5)
    assert relative_l2(found.latents, latents) < 1e-3
    assert found.images is not None
    assert np.abs(found.images - 255 * images).max() < 1
