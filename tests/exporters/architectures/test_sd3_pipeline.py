"""Stable Diffusion 3 end to end: the latents and images of diffusers, with and without a cache."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import goc_deploy
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.display.units import unit_rows
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.sd3_layout import TABLE
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.sums import check_that_sums_take_the_place_of_features
from tests.exporters.architectures.test_sd3 import CONFIG, WEIGHTS, judge_of
from tests.exporters.architectures.test_sd3_layout import of_authors
from tests.reference import relative_l2, table_step

PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:2@0.5+gc:1.0", "fora:3+lagrange:2", "fora:10")
STEPS, SCALE, WORDS = 10, 4.0, 21
SIZES = [(64, 64), (96, 80), (16, 144)]  # width and height in pixels
VAE = {
    "latent_channels": 16,
    "block_out_channels": (4, 4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A random pipeline of diffusers without its text encoders."""
    transformer = judge_of(CONFIG)
    vae = diffusers.AutoencoderKL(**VAE).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@pytest.fixture(scope="module")
def engine(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder / "pipeline")
    manifest = goc_deploy.export(
        folder / "pipeline", folder / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=SIZES[0], max_size=(96, 96), vae=folder / "pipeline", caption_tokens=WORDS,
    )  # fmt: skip
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder / "engine"


def arrays(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Two captions of all tokens, and one negative caption."""
    assert spec.caption_tokens == WORDS
    draw, shape = np.random.default_rng(1).standard_normal, (WORDS, spec.caption_channels)
    return {
        "prompt_embeds": draw((2, *shape)).astype(np.float32),
        "negative_prompt_embeds": draw((1, *shape)).astype(np.float32),
        "pooled_prompt_embeds": draw((2, spec.pooled_channels)).astype(np.float32),
        "negative_pooled_prompt_embeds": draw((1, spec.pooled_channels)).astype(np.float32),
    }


def captions_of(spec: ModelSpec) -> PromptEmbeds:
    return prompt_embeds_from_arrays(arrays(spec), spec, "")


def noise_of(size: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((2, 16, size[1] // 8, size[0] // 8))
    return noise.astype(np.float32)


class CachedLayers:
    """The layers of diffusers' blocks, which a schedule computes or predicts unit by unit."""

    def __init__(self, judge: Any, schedule: Schedule) -> None:
        self.step, self._schedule = 0, schedule
        self._histories: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
        self._originals = []
        for i, block in enumerate(judge.transformer_blocks):
            of_units = ((block.attn, block.attn2), (block.ff, block.ff_context))
            for unit, layers in enumerate(of_units, 2 * i):
                for layer in layers:
                    if layer is not None:
                        self._originals.append((layer, layer.forward))
                        layer.forward = self._cached(unit, layer.forward)

    def _cached(self, unit: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **more: Any) -> Any:
            row, history = self._schedule.coefficients[self.step][unit], self._histories[compute]
            if row:
                parts = zip(*(history[lag] for lag in range(len(row))), strict=True)
                value = tuple(sum(c * g for c, g in zip(row, p, strict=True)) for p in parts)
            else:
                found = compute(*args, **more)
                value = found if isinstance(found, tuple) else (found,)
            if not row or self._schedule.history == "used":
                history.insert(0, value)
            return value if len(value) > 1 else value[0]

        return forward

    def restore(self) -> None:
        for layer, forward in self._originals:
            layer.forward = forward


@torch.inference_mode()
def eager_latents(
    judge: Any, schedule: Schedule, table: SamplerTable, noise: np.ndarray, spec: ModelSpec
) -> np.ndarray:
    """Final latents of diffusers' transformer with hooked layers; conditional rows first."""
    given = {name: torch.from_numpy(values) for name, values in arrays(spec).items()}

    def rows(name: str) -> Tensor:
        return torch.cat([given[name], given[f"negative_{name}"].expand_as(given[name])])

    captions, pooled = rows("prompt_embeds"), rows("pooled_prompt_embeds")
    x, step_of, layers = torch.from_numpy(noise), table_step(table), CachedLayers(judge, schedule)
    try:
        for step, t in enumerate(table.timesteps):
            layers.step = step
            output = judge(torch.cat([x, x]), captions, pooled, torch.full((4,), t)).sample
            cond, uncond = output.chunk(2)
            zeros = torch.zeros_like(x)
            x = step_of(step, x, uncond + SCALE * (cond - uncond), zeros, zeros)
    finally:
        layers.restore()
    return x.numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS[:-1])
def test_latents_are_those_of_diffusers_with_hooked_layers(
    pipeline: Any, engine: Path, plan: str, size: tuple[int, int]
) -> None:
    noise = noise_of(size)
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec),
            latents=noise,
            size=size,
            cfg_scale=SCALE,
            decode=False,
        ).latents
        schedule, table, spec = pipe.plan.schedule, pipe.plan.sampler, pipe.spec
    expected = eager_latents(pipeline.transformer, schedule, table, noise, spec)
    assert relative_l2(found, expected) < 1e-4


def test_images_are_those_of_the_pipeline(pipeline: Any, engine: Path) -> None:
    """The schedule, the guidance and the VAE are those of diffusers too."""
    noise = noise_of(SIZES[0])
    with goc_deploy.load(engine, plan="none") as pipe:
        found = pipe.generate(prompt_embeds=captions_of(pipe.spec), latents=noise, cfg_scale=SCALE)
        given = {name: torch.from_numpy(values) for name, values in arrays(pipe.spec).items()}
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        given[name] = torch.cat([given[name]] * 2)
    pipeline.set_progress_bar_config(disable=True)
    images = {
        kind: pipeline(
            **given, latents=torch.from_numpy(noise), height=SIZES[0][1], width=SIZES[0][0],
            num_inference_steps=STEPS, guidance_scale=SCALE, output_type=kind,
        ).images
        for kind in ("latent", "np")
    }  # fmt: skip
    assert relative_l2(found.latents, images["latent"].numpy()) < 1e-3
    expected = pixels_to_uint8(2 * images["np"].transpose(0, 3, 1, 2) - 1)
    assert found.images is not None
    assert np.abs(found.images.astype(int) - expected.astype(int)).max() <= 2


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "fora:3+lagrange:2"])
def test_sums_of_any_size_take_the_place_of_features(engine: Path, plan: str) -> None:
    check_that_sums_take_the_place_of_features(
        engine,
        plan,
        lambda spec: {"prompt_embeds": captions_of(spec), "size": (96, 32), "decode": False},
    )


def test_a_collapsed_step_reads_no_text(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:10", max_sessions=1) as pipe:
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=captions_of(pipe.spec))


def test_the_command_line_shows_units_features_streams_and_bytes(
    engine: Path, command: Command
) -> None:
    shown = command("goc-plan", engine, "--inspect").stdout
    words = set(re.split(r"[^\w.]+", shown))  # a cell may be folded to several lines
    columns, rows = unit_rows(read_manifest(engine))
    for cell in (*columns, *(cell for row in rows for cell in row)):
        assert set(re.split(r"[^\w.]+", cell)) <= words, cell
    assert {"tokens", "saved", "predictions", "text", "buffers"} <= words


def test_a_file_of_the_authors_holds_the_same_model(engine: Path, tmp_path: Path) -> None:
    state = load_file(engine.parent / "pipeline" / "transformer" / WEIGHTS)
    file = of_authors(state, CONFIG["num_layers"])
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in file.items()}, tmp_path / "sd3.safetensors"
    )
    manifest = goc_deploy.export(
        tmp_path / "sd3.safetensors", tmp_path / "engine", plans=["none"], steps=4,
        size=SIZES[0], max_size=(96, 96),
    )  # fmt: skip
    expected = json.loads((engine / "manifest.json").read_text())
    digests = {entry["path"]: entry["sha256"] for entry in expected["files"]}
    found = {entry.path: entry.sha256 for entry in manifest.files}
    weights = [path for path in found if path.endswith(".weights")]
    assert len(weights) == 2 * CONFIG["num_layers"] + 4
    assert {path: found[path] for path in weights} == {path: digests[path] for path in weights}
    assert manifest.model.positions is not None
    assert manifest.model.positions.table == CONFIG["pos_embed_max_size"]


def test_a_size_beyond_the_position_table_is_refused(engine: Path) -> None:
    with (
        goc_deploy.load(engine, plan="none") as pipe,
        pytest.raises(UsageError, match=r"`size` must be at most 144 per side, got \(160, 16\)"),
    ):
        pipe.generate(prompt_embeds=captions_of(pipe.spec), size=(160, 16))


def test_a_learned_position_table_is_refused(engine: Path, tmp_path: Path) -> None:
    source = engine.parent / "pipeline" / "transformer"
    state = load_file(source / WEIGHTS)
    state[TABLE] += 0.1
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ModelError, match=r"the position table pos_embed\.pos_embed was learned"):
        goc_deploy.export(tmp_path, tmp_path / "e", steps=4, plans=["none"])
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("tokens", "told"), [(334, "at most 333"), (0, "at least 1")])
def test_a_number_of_tokens_that_the_model_does_not_read_is_refused(
    engine: Path, tmp_path: Path, tokens: int, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        goc_deploy.export(engine.parent / "pipeline", tmp_path / "engine", caption_tokens=tokens)
    assert not (tmp_path / "engine").exists()
