"""Wan: the same videos as diffusers at several sizes, with and without a cache, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import goc_deploy
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.errors import GocError, ModelError, UsageError
from goc_deploy.exporters.architectures.wan_diffusers import SAMPLES, spec_of
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.pixart_reference import eager_latents
from tests.reference import relative_l2

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "text_dim": 32,
    "ffn_dim": 100,
    "num_layers": 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2", "fora:10")
STEPS = 10
# Width and height in pixels, frames, and the shape of the latents.
SIZES = [
    ((96, 80), 9, (3, 10, 12)),
    ((128, 64), 13, (4, 8, 16)),
    ((48, 32), 1, (1, 4, 6)),
]
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def unipc(shift: float = 3.0) -> Any:
    """The scheduler of the public models."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def random_model() -> Any:
    """A Wan of diffusers with random weights."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**CONFIG).eval()
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1)
    return model


@pytest.fixture(scope="module")
def judge() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def folder(judge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    judge.save_pretrained(folder / "transformer")
    unipc().save_pretrained(folder / "scheduler")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Path:
    manifest = goc_deploy.export(
        folder, folder.parent / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=(96, 80), frames=9, max_size=(128, 128), max_frames=13,
    )  # fmt: skip
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder.parent / "engine"


def arrays(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Two captions of 13 tokens and a short negative one."""
    draw = np.random.default_rng(1).standard_normal
    return {
        "prompt_embeds": draw((2, 13, spec.caption_channels)).astype(np.float32),
        "negative_prompt_embeds": draw((1, 5, spec.caption_channels)).astype(np.float32),
    }


def captions_of(spec: ModelSpec) -> PromptEmbeds:
    return prompt_embeds_from_arrays(arrays(spec), spec, "")


def noise_of(shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((2, 16, *shape))
    return noise.astype(np.float32)


def padded(embeds: np.ndarray) -> torch.Tensor:
    """Captions as diffusers' pipeline pads them: with zeros, without a mask."""
    return torch.from_numpy(np.pad(embeds, ((0, 0), (0, 512 - embeds.shape[1]), (0, 0))))


def guided_model(judge: Any, given: dict[str, np.ndarray]) -> Callable[..., torch.Tensor]:
    """The model of diffusers, whose features a `Cache` may replace."""
    cond, uncond = padded(given["prompt_embeds"]), padded(given["negative_prompt_embeds"])
    captions = torch.cat([cond, uncond, uncond])

    def run(x: torch.Tensor, t: torch.Tensor, feature: Any) -> torch.Tensor:
        originals = []
        for i, block in enumerate(judge.blocks):
            for branch, layer in enumerate((block.attn1, block.attn2, block.ffn)):
                originals.append((layer, layer.forward))

                def cached(
                    *args: Any, _unit: int = 3 * i + branch, _own: Any = layer.forward, **more: Any
                ) -> torch.Tensor:
                    return feature(_unit, lambda: _own(*args, **more))

                layer.forward = cached
        try:
            return judge(x, t, captions).sample
        finally:
            for layer, forward in originals:
                layer.forward = forward

    return run


@pytest.mark.parametrize(("size", "frames", "shape"), SIZES)
@pytest.mark.parametrize("plan", ["none", "fora:2", "fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_latents_are_those_of_diffusers_with_hooked_blocks(
    judge: Any, engine: Path, plan: str, size: tuple[int, int], frames: int, shape: tuple[int, ...]
) -> None:
    noise = noise_of(shape)
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec), latents=noise, size=size, frames=frames
        ).latents
        schedule, table, given = pipe.plan.schedule, pipe.plan.sampler, arrays(pipe.spec)
    expected = eager_latents(guided_model(judge, given), schedule, table, noise, 4.0, 16)
    assert relative_l2(found, expected) < 1e-4


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("kind", ["unipc", "euler"])
def test_the_loop_of_diffusers_is_followed(
    judge: Any, kind: str, steps: int, tmp_path: Path
) -> None:
    """UniPC with its corrector, and flow Euler with a shift, from scheduler_config.json."""
    scheduler = (
        unipc(5.0) if kind == "unipc" else diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    )
    folder = tmp_path / "pipeline"
    judge.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    goc_deploy.export(
        folder, tmp_path / "e", plans=["none"], steps=steps, max_batch=2, size=(48, 32), frames=5
    )
    noise = noise_of((2, 4, 6))
    with goc_deploy.load(tmp_path / "e") as pipe:
        given = arrays(pipe.spec)
        found = pipe.generate(prompt_embeds=captions_of(pipe.spec), latents=noise).latents
    run, x = guided_model(judge, given), torch.from_numpy(noise)
    scheduler.set_timesteps(steps)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = run(torch.cat([x, x]), t.expand(4), lambda _unit, compute: compute())
            cond, uncond = output.chunk(2)
            x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x).prev_sample
    assert relative_l2(found, x.numpy()) < 1e-3


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_sums_of_any_size_take_the_place_of_features(engine: Path, plan: str) -> None:
    results, sizes = {}, {}
    for history in ("features", "sums"):
        with goc_deploy.load(engine, plan=plan, history=history) as pipe:
            request = {"prompt_embeds": captions_of(pipe.spec), "seed": 1, "size": (48, 32)}
            results[history] = pipe.generate(**request).latents
            sizes[history] = pipe.plan.cache_features
    assert relative_l2(results["sums"], results["features"]) < 1e-5
    assert sizes["sums"] < sizes["features"]


def test_a_collapsed_step_reads_no_captions(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:10", max_sessions=1) as pipe:
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=captions_of(pipe.spec))


def test_a_checkpoint_file_holds_the_same_model(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    save_file(tensors, tmp_path / "wan.safetensors")
    options = {"size": (48, 32), "frames": 5, "sampler": "euler", "plans": ["none"], "steps": 4}
    from_file = goc_deploy.export(
        tmp_path / "wan.safetensors", tmp_path / "a", num_heads=3, **options
    )
    from_folder = goc_deploy.export(folder / "transformer", tmp_path / "b", **options)
    assert from_file.model == from_folder.model
    results = []
    for name in ("a", "b"):
        with goc_deploy.load(tmp_path / name) as pipe:
            results.append(pipe.generate(prompt_embeds=captions_of(pipe.spec), seed=4).latents)
    np.testing.assert_array_equal(*results)


def test_public_models_draw_the_sizes_of_their_pages() -> None:
    small = spec_of(30, 12, 128, ffn=8960, channels=16, text=4096)
    assert (small.hidden, small.units, small.tokens) == (1536, 90, 32760)
    assert small.positions is not None
    assert small.positions.widths == (44, 42, 42)
    newer = spec_of(30, 24, 128, ffn=14336, channels=48, text=4096)
    assert (newer.sample, newer.vae_scale) == (SAMPLES[48][1], 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 8}, "`frames` must be one more than a multiple of 4, such as 17, got 8"),
        ({"frames": 17}, "17 frames of 96x80 is more than the engine directory accepts"),
        (
            {"size": (90, 80)},
            r"`size` must be a width and a height that 16 divides, got \(90, 80\)",
        ),
        ({"size": (256, 256)}, "more than the engine directory accepts"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(
    engine: Path, arguments: dict[str, Any], message: str
) -> None:
    with (
        goc_deploy.load(engine, plan="none") as pipe,
        pytest.raises(UsageError, match=message),
    ):
        pipe.generate(prompt_embeds=captions_of(pipe.spec), **arguments)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "starts from a picture": ({"image_dim": 1280}, "image_dim is 1280, only None is supported"),
    "more channels in": ({"in_channels": 36}, "models that start from a picture or a video"),
    "another norm": ({"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm', only"),
    "another patch": ({"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\], only \[1, 2, 2\]"),
    "odd heads": ({"attention_head_dim": 25}, "attention_head_dim is 25"),
    "another width": ({"num_attention_heads": 4}, "of another shape"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folders_that_do_not_fit_are_refused_by_name(
    folder: Path, tmp_path: Path, change: str
) -> None:
    values, message = CHANGES[change]
    shutil.copytree(folder, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ModelError, match=message):
        goc_deploy.export(tmp_path / "pipeline", tmp_path / "e", steps=4, plans=["none"])
    assert not (tmp_path / "e").exists()


def test_a_head_for_videos_is_refused(engine: Path) -> None:
    with pytest.raises(UsageError, match=r"\+head: heads correct images; leave \+head out"):
        goc_deploy.add_plan(engine, "fora:2+head:patch", calibrate=16)


def test_embeddings_of_another_width_are_refused(engine: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", prompt_embeds=np.zeros((1, 4, 20), np.float32))
    with goc_deploy.load(engine, plan="none") as pipe, pytest.raises(GocError, match="of width 20"):
        prompt_embeds_from_arrays(dict(np.load(tmp_path / "c.npz")), pipe.spec, "c.npz")


def test_the_command_line_draws_clips(engine: Path, command: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **arrays(spec_of(3, 3, 24, ffn=100, channels=16, text=32)))
    base = [engine, "--prompt-embeds", tmp_path / "c.npz", "--plan", "fora:2"]
    output = ["--latents-output", tmp_path / "x.npy"]
    command("goc-run", *base, "--size", "48x32", "--frames", "5", *output)
    assert np.load(tmp_path / "x.npy").shape == (2, 16, 2, 4, 6)
    noise = noise_of((2, 4, 6))
    np.save(tmp_path / "noise.npy", noise)
    more = ["--latents", tmp_path / "noise.npy", "--report", tmp_path / "report.json"]
    command("goc-run", *base, "--size", "48x32", "--frames", "5", *more, *output)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["size"], report["frames"]) == ([48, 32], 5)
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        expected = pipe.generate(
            prompt_embeds=captions_of(pipe.spec), latents=noise, size=(48, 32), frames=5
        ).latents
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    wrong = command("goc-run", *base, "--frames", "8", *output, code=2)
    assert "--frames must be one more than a multiple of 4" in wrong.stderr
    wrong = command("goc-run", *base, "--size", "48", *output, code=2)
    assert "'48' must be a width and a height, such as 1024x768" in wrong.stderr
