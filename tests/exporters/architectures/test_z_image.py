"""Z-Image: the graphs and the images of diffusers, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import goc_deploy
from goc_deploy.conditions.captions import MASKED, prompt_embeds_from_arrays
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.z_image import (
    FAMILY,
    spec_from_config,
    spec_from_tensors,
)
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.test_qwen import graphs_in_order, rows_of
from tests.pixart_reference import Cache
from tests.reference import table_step

CONFIG: dict[str, Any] = {
    "dim": 288,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": [24, 36, 36],
    "axes_lens": [1024, 64, 64],
}
LENGTHS = (37, 5)  # tokens of the two captions, which are padded to 64 and 32
GRIDS = [(4, 8), (16, 6)]
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def tiny_judge() -> Any:
    """A random model of diffusers."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(**CONFIG).eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and "weight" in name
        parameter.data.normal_(1.0 if norm else 0.0, 0.1)
    return model


@pytest.fixture(scope="module")
def judge() -> Any:
    return tiny_judge()


def tiny(judge: Any, grid: tuple[int, int] = GRIDS[0]) -> ModelSpec:
    spec = spec_from_config(json.loads(judge.to_json_string()), "config.json")
    return replace(spec, grid=grid, max_grid=grid, caption_tokens=70)


def hooked(judge: Any, kept: dict[str, list[Tensor]], tokens: int) -> list[Any]:
    """Hooks that keep the features of every unit, by its name: of the image, then of the text."""
    hooks = []
    blocks = [*judge.noise_refiner, *judge.layers]
    for i, block in enumerate(blocks):
        for branch, layer in (("attn", block.attention_norm2), ("mlp", block.ffn_norm2)):

            def keep(_m: Any, _a: Any, out: Tensor, name: str = f"block_{i:02d}_{branch}") -> None:
                kept[name] = [out[:, :tokens], out[:, tokens:]]

            hooks.append(layer.register_forward_hook(keep))
    return hooks


@pytest.mark.parametrize("grid", GRIDS)
def test_every_unit_computes_what_diffusers_computes(judge: Any, grid: tuple[int, int]) -> None:
    """The graphs in a chain, with captions of two lengths, and the law of a collapsed step."""
    spec, rng = tiny(judge, grid), torch.Generator().manual_seed(1)
    assert FAMILY.shapes(spec) == {n: tuple(t.shape) for n, t in judge.state_dict().items()}
    latents = torch.randn((2, *spec.latents), generator=rng)
    captions = torch.randn((2, spec.caption_tokens, 40), generator=rng)
    mask = torch.arange(spec.caption_tokens) < torch.tensor(LENGTHS)[:, None]
    kept: dict[str, list[Tensor]] = {}
    hooks = hooked(judge, kept, spec.tokens)
    with torch.inference_mode():
        outputs = judge(
            list(latents[:, :, None]),
            torch.full((2,), 1 - 0.73125),
            [caption[:length] for caption, length in zip(captions, LENGTHS, strict=True)],
        ).sample
    expected = -torch.stack(outputs)[:, :, 0]
    for hook in hooks:
        hook.remove()
    rows = torch.arange(2)
    tensors = {name: torch.from_numpy(v) for name, v in size_tensors(spec).items()}
    tensors |= {"timesteps": torch.tensor([999.0, 731.25]), "captions": captions}
    tensors |= {"bias": MASKED * (~mask).float(), "caption_rows": rows, "rows": rows}
    tensors["latents"] = latents.reshape(spec.in_patches((2, *spec.latents)))
    total = torch.zeros(())
    for name, kind in graphs_in_order(FAMILY.graph_kinds(spec, "fp32"), spec, judge.state_dict()):
        tensors |= rows_of(spec, name, tensors)
        if name == "final":
            assert relative_l2(total.numpy(), tensors["x"].double().numpy()) < 1e-6
            tensors["x"] = tensors["x"].reshape(2, *grid, -1)
        with torch.inference_mode():
            found = kind.module(*(tensors[i.name] for i in kind.inputs))
        made = dict(zip(kind.outputs, found if isinstance(found, tuple) else [found], strict=True))
        tensors |= {output.removesuffix("_out"): value for output, value in made.items()}
        if name == "embed":
            tensors["x"] = tensors["x"].flatten(1, 2)
            total = tensors["x"].double()
        if name.startswith("block"):
            image, text = kept[name]
            assert relative_l2(made["feature"].numpy(), image.flatten(0, 1).numpy()) < 1e-4
            if "feature_text" in made:
                ours = made["feature_text"].reshape(2, spec.caption_tokens, -1)
                for row, padded in enumerate((64, 32)):
                    error = relative_l2(ours[row, :padded].numpy(), text[row, :padded].numpy())
                    assert error < 1e-4
            gated = tensors["gate"].double()[:, None] * made["feature"].double().view_as(total)
            total = total + gated
    found = tensors["prediction"].reshape(expected.shape)
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-4


PLANS = ("none", "fora:2", "fora:2+gc:1.0", "fora:6")
STEPS, SCALE = 6, 3.0
SIZES = {(128, 64): (4, 8), (96, 256): (16, 6)}  # width and height in pixels: rows and columns


@pytest.fixture(scope="module")
def engine(judge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z")
    judge.save_pretrained(folder / "transformer")
    manifest = goc_deploy.export(
        folder / "transformer", folder / "engine", plans=PLANS, steps=STEPS, max_batch=2,
        size=(128, 64), max_size=(192, 128), sampler="euler",
    )  # fmt: skip
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder / "engine"


def arrays() -> dict[str, np.ndarray]:
    """Two captions of 37 and 5 tokens, and a negative one."""
    draw = np.random.default_rng(1).standard_normal
    mask = np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None]
    return {
        "prompt_embeds": draw((2, LENGTHS[0], 40)).astype(np.float32),
        "prompt_attention_mask": mask.astype(np.int64),
        "negative_prompt_embeds": draw((1, 3, 40)).astype(np.float32),
    }


@torch.inference_mode()
def eager_latents(
    judge: Any, schedule: Schedule, table: SamplerTable, noise: np.ndarray
) -> np.ndarray:
    """The final latents of diffusers' model, whose features a schedule replaces."""
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    captions = [e[:n] for e, n in zip(given["prompt_embeds"], LENGTHS, strict=True)]
    captions += [given["negative_prompt_embeds"][0]] * 2
    cache, originals = Cache(schedule), []
    for i, block in enumerate([*judge.noise_refiner, *judge.layers]):
        for branch, layer in enumerate((block.attention_norm2, block.ffn_norm2)):

            def cached(x: Tensor, own: Any = layer.forward, unit: int = 2 * i + branch) -> Tensor:
                return cache(unit, lambda: own(x))

            originals.append((layer, layer.forward))
            layer.forward = cached
    x, step_of = torch.from_numpy(noise), table_step(table)
    for step, t in enumerate(table.timesteps):
        cache.step = step
        times = torch.full((4,), 1 - float(t) / 1000)
        output = -torch.stack(judge(list(torch.cat([x, x])[:, :, None]), times, captions).sample)
        cond, uncond = output[:, :, 0].chunk(2)
        x = step_of(step, x, uncond + SCALE * (cond - uncond), output, torch.zeros_like(x))
    for layer, forward in originals:
        layer.forward = forward
    return x.numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_latents_are_those_of_diffusers_with_hooked_blocks(
    judge: Any, engine: Path, plan: str, size: tuple[int, int]
) -> None:
    rows, columns = SIZES[size]
    noise = np.random.default_rng(2).standard_normal((2, 16, 2 * rows, 2 * columns), np.float32)
    with goc_deploy.load(engine, plan=plan) as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        found = pipe.generate(
            prompt_embeds=embeds, latents=noise, size=size, cfg_scale=SCALE
        ).latents
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    assert relative_l2(found, eager_latents(judge, schedule, table, noise)) < 1e-4


@pytest.mark.parametrize("steps", [4, 10])
def test_the_loop_of_the_pipeline_is_followed(judge: Any, tmp_path: Path, steps: int) -> None:
    """The latents of the pipeline, with its scheduler, at two sizes."""
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), vae=None,
        text_encoder=None, tokenizer=None, transformer=judge,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    for name in ("scheduler", "transformer"):
        getattr(pipeline, name).save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    goc_deploy.export(
        tmp_path, tmp_path / "engine", plans=["none"], steps=steps, max_batch=2, size=(128, 64),
        max_size=(192, 128), caption_tokens=64,
    )  # fmt: skip
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    captions = [e[:n] for e, n in zip(given["prompt_embeds"], LENGTHS, strict=True)]
    with goc_deploy.load(tmp_path / "engine") as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        for size, (rows, columns) in SIZES.items():
            shape = (2, 16, 2 * rows, 2 * columns)
            noise = np.random.default_rng(2).standard_normal(shape, np.float32)
            found = pipe.generate(
                prompt_embeds=embeds, latents=noise, size=size, cfg_scale=SCALE
            ).latents
            expected = pipeline(
                prompt_embeds=captions, latents=torch.from_numpy(noise), guidance_scale=SCALE - 1,
                negative_prompt_embeds=[given["negative_prompt_embeds"][0]] * 2, width=size[0],
                height=size[1], num_inference_steps=steps, output_type="latent",
            ).images  # fmt: skip
            assert relative_l2(found, expected.numpy()) < 1e-3


def test_a_collapsed_step_reads_no_text(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:6", max_sessions=1) as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        check_that_collapsed_steps_read_no_conditions(pipe, prompt_embeds=embeds)


def test_sizes_that_need_padding_are_refused(engine: Path) -> None:
    with goc_deploy.load(engine, plan="none") as pipe:
        embeds = prompt_embeds_from_arrays(arrays(), pipe.spec, "")
        with pytest.raises(UsageError, match="a multiple of 32 patches of 16x16 pixels"):
            pipe.generate(prompt_embeds=embeds, size=(96, 64))


def test_captions_that_the_model_would_pad_further_are_refused(
    engine: Path, tmp_path: Path
) -> None:
    folder = engine.parent / "transformer"
    with pytest.raises(UsageError, match="pads captions to a multiple of 32 tokens"):
        goc_deploy.export(folder, tmp_path / "engine", sampler="euler", caption_tokens=70)
    assert not (tmp_path / "engine").exists()


def test_the_tensors_alone_show_the_sizes(judge: Any) -> None:
    state = judge.state_dict()
    assert spec_from_tensors(state, None) == spec_from_config(
        json.loads(judge.to_json_string()), ""
    )


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "pictures as inputs": ({"siglip_feat_dim": 1152}, "siglip_feat_dim is 1152, only None"),
    "two patches": ({"all_patch_size": [2, 4]}, r"all_patch_size is \[2, 4\], only \[2\]"),
    "shared keys": ({"n_kv_heads": 1}, "n_kv_heads is 1, expected n_heads, 3"),
    "no norms": ({"qk_norm": False}, "qk_norm is False, only True is supported"),
    "other axes": ({"axes_dims": [24, 36, 38]}, r"axes_dims is \[24, 36, 38\]"),
    "another scale": ({"t_scale": 1.0}, "t_scale is 1.0, only 1000.0"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configurations_that_do_not_fit_are_refused_by_name(judge: Any, change: str) -> None:
    values, message = CHANGES[change]
    config = json.loads(judge.to_json_string())
    with pytest.raises(ModelError, match=message):
        spec_from_config({**config, **values}, "config.json")
