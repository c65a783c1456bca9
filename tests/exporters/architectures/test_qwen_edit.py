"""Qwen-Image-Edit: the latents of diffusers, with and without a cache, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import goc_deploy
from goc_deploy.api.run import run
from goc_deploy.conditions.references import checked_references
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.architectures.qwen_edit import QWEN_IMAGE_EDIT, spec_from_config
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.options import RunOptions
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.size_inputs import size_tensors
from tests.distances import relative_l2
from tests.exporters.architectures.poisoned import check_that_collapsed_steps_read_no_conditions
from tests.exporters.architectures.sums import check_that_sums_take_the_place_of_features
from tests.exporters.architectures.test_qwen import packed, unpacked
from tests.exporters.architectures.test_qwen_images import (
    SCHEDULER,
    arrays,
    cached_units,
    captions_of,
    guided,
    random_vae,
)
from tests.pixart_reference import Cache
from tests.qwen_folder import random_qwen
from tests.reference import table_step

PLANS = ("none", "fora:2", "fora:2+gc:1.0", "compute:0,2,3+gc:0.5", "fora:10")
STEPS, SCALE = 10, 4.0
SIZE, GRID = (80, 48), (3, 5)  # width and height in pixels: rows and columns
REFERENCE, SECOND = (4, 3), (2, 5)  # rows and columns of tokens of the reference images
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def judge() -> Any:
    return random_qwen()


@pytest.fixture(scope="module")
def pipeline(judge: Any) -> Any:
    """The pipeline of diffusers, without a text encoder."""
    made = diffusers.QwenImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=random_vae(),
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=judge,
    )
    made.set_progress_bar_config(disable=True)
    return made


def save_pipeline(pipeline: Any, folder: Path, name: str) -> Path:
    for part in ("scheduler", "transformer"):
        getattr(pipeline, part).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pipeline."""
    folder = tmp_path_factory.mktemp("edit") / "pipeline"
    return save_pipeline(pipeline, folder, "QwenImageEditPipeline")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Path:
    manifest = goc_deploy.export(
        folder, folder.parent / "engine", plans=PLANS, steps=STEPS, max_batch=2, size=SIZE,
        max_size=(96, 64), caption_tokens=15, max_references=2,
    )  # fmt: skip
    assert manifest.model.architecture == "qwen-image-edit"
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    return folder.parent / "engine"


def latents_of(seed: int, grid: tuple[int, int]) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal
    return draw((2, 16, 2 * grid[0], 2 * grid[1])).astype(np.float32)


REFERENCES = (latents_of(3, REFERENCE), latents_of(4, SECOND))


def eager_latents(
    judge: Any,
    schedule: Schedule,
    table: SamplerTable,
    noise: np.ndarray,
    references: Sequence[np.ndarray],
) -> np.ndarray:
    """The final latents of diffusers' model, whose features a schedule replaces.

    A feature of the image has the tokens of references too, as in diffusers.
    """
    given = arrays()
    short = np.pad(given["negative_prompt_embeds"], ((0, 0), (0, 8), (0, 0)))
    embeds = torch.from_numpy(np.concatenate([given["prompt_embeds"], short, short]))
    mask = torch.ones(4, 13, dtype=torch.bool)
    mask[1, 9:], mask[2:, 5:] = False, False
    caches = {stream: Cache(schedule) for stream in ("image", "text")}
    x, step_of = torch.from_numpy(noise), table_step(table)
    others = [torch.from_numpy(latents) for latents in references]
    grids = [(latents.shape[2] // 2, latents.shape[3] // 2) for latents in (noise, *references)]
    count = grids[0][0] * grids[0][1]
    with (
        torch.inference_mode(),
        cached_units(judge, lambda stream, unit, compute: caches[stream](unit, compute)),
    ):
        for step, t in enumerate(table.timesteps):
            for cache in caches.values():
                cache.step = step
            tokens = torch.cat([packed(torch.cat([one, one])) for one in (x, *others)], dim=1)
            shapes = [[(1, *grid) for grid in grids]] * 4
            times = torch.full((4,), float(t) / 1000)
            made = judge(tokens, embeds, mask, times, img_shapes=shapes).sample[:, :count]
            output = unpacked(made, grids[0])
            m = guided(*output.chunk(2), grids[0])
            x = step_of(step, x, m, output, torch.zeros_like(x))
    return x.numpy()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_latents_are_those_of_diffusers_with_hooked_blocks(
    judge: Any, engine: Path, plan: str, count: int
) -> None:
    """Also of two reference images, as in ``QwenImageEditPlusPipeline``."""
    noise, references = latents_of(2, GRID), REFERENCES[:count]
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec),
            latents=noise,
            reference_latents=references,
            cfg_scale=SCALE,
        ).latents
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    expected = eager_latents(judge, schedule, table, noise, references)
    assert relative_l2(found, expected) < 1e-4


class GivenLatents:
    """Replaces what the pipeline does with pictures: it returns latents that were prepared."""

    def __init__(self, latents: np.ndarray) -> None:
        self._latents = torch.from_numpy(latents).unsqueeze(2)

    def resize(self, image: Any, *_size: int) -> Any:
        return image

    def preprocess(self, *_given: Any) -> Tensor:
        latents: Tensor = self._latents.squeeze(2)
        return latents


@pytest.mark.parametrize("steps", [4, 10])
def test_the_loop_of_the_pipeline_is_followed(
    pipeline: Any, engine: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The latents of the pipeline, with its scheduler and the size that it calculates."""
    reference, noise = REFERENCES[0], latents_of(2, GRID)
    height, width = (8 * side for side in reference.shape[2:])
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit.calculate_dimensions"
    monkeypatch.setattr(module, lambda *_: (width, height, None))
    monkeypatch.setattr(pipeline, "image_processor", GivenLatents(reference))
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    theirs = pipeline(
        image=Picture(),
        prompt_embeds=given["prompt_embeds"],
        prompt_embeds_mask=given["prompt_attention_mask"],
        negative_prompt_embeds=given["negative_prompt_embeds"].expand(2, -1, -1),
        negative_prompt_embeds_mask=torch.ones(2, 5, dtype=torch.int64),
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=steps,
        true_cfg_scale=SCALE,
        latents=packed(torch.from_numpy(noise)),
        output_type="latent",
    ).images
    with goc_deploy.load(engine, plan="none", steps=steps) as pipe:
        found = pipe.generate(
            prompt_embeds=captions_of(pipe.spec),
            latents=noise,
            reference_latents=reference,
            cfg_scale=SCALE,
        ).latents
    assert relative_l2(found, unpacked(theirs, GRID).numpy()) < 1e-3


class Picture:
    """Has a size, which is all that the pipeline reads of a picture here."""

    size = (60, 80)


def test_positions_are_those_of_diffusers(judge: Any) -> None:
    """Also of the text, which stands behind the largest of all images."""
    spec = spec_from_config(json.loads(judge.to_json_string()), "")
    spec = spec.at(GRID, (REFERENCE, (2, 9)))
    shapes = [[(1, *GRID), (1, *REFERENCE), (1, 2, 9)]]
    image, text = judge.pos_embed(shapes, device=torch.device("cpu"), max_txt_seq_len=2048)
    found = size_tensors(spec)
    for prefix, expected in (("", image[:15]), ("reference_", image[15:]), ("text_", text)):
        for name, part in (("cos", expected.real), ("sin", expected.imag)):
            np.testing.assert_allclose(found[prefix + name], part.numpy(), atol=2e-4)


def test_one_reference_row_is_for_all_images(engine: Path) -> None:
    one = REFERENCES[0][:1]
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        request = {"prompt_embeds": captions_of(pipe.spec), "seed": 1}
        shared = pipe.generate(**request, reference_latents=one).latents
        repeated = pipe.generate(**request, reference_latents=np.concatenate([one, one])).latents
        other = pipe.generate(**request, reference_latents=REFERENCES[0]).latents
    np.testing.assert_array_equal(shared, repeated)
    np.testing.assert_allclose(shared[0], other[0], rtol=1e-4, atol=1e-5)
    assert relative_l2(shared[1], other[1]) > 1e-3


@pytest.mark.parametrize("plan", ["fora:2+gc:1.0", "compute:0,2,3+gc:0.5"])
def test_sums_take_the_place_of_features(engine: Path, plan: str) -> None:
    check_that_sums_take_the_place_of_features(
        engine,
        plan,
        lambda spec: {"prompt_embeds": captions_of(spec), "reference_latents": REFERENCES},
    )


def test_a_collapsed_step_reads_no_reference(engine: Path) -> None:
    """Nor the text."""
    with goc_deploy.load(engine, plan="fora:10", max_sessions=1) as pipe:
        check_that_collapsed_steps_read_no_conditions(
            pipe, prompt_embeds=captions_of(pipe.spec), reference_latents=REFERENCES
        )
        (session,) = pipe.engines.weights.sessions
        assert set(session.buffers.others) == {"text", "reference"}


def test_files_of_references_are_drawn_by_the_command(engine: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "captions.npz", **arrays())
    np.savez(tmp_path / "a.npz", reference_latents=REFERENCES[0])
    tensors = {"reference_latents": REFERENCES[0], "reference_latents_2": REFERENCES[1]}
    save_file({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "b.safetensors")
    for file, count in (("a.npz", 1), ("b.safetensors", 2)):
        options = {"prompt_embeds": tmp_path / "captions.npz", "plan": "fora:2", "seed": 5}
        run(
            engine,
            RunOptions(
                **options,
                reference_latents=tmp_path / file,
                latents_output=tmp_path / "out.npy",
                batch_size=1,
            ),
        )
        with goc_deploy.load(engine, plan="fora:2", batch_size=1) as pipe:
            expected = pipe.generate(
                prompt_embeds=captions_of(pipe.spec), seed=5, reference_latents=REFERENCES[:count]
            ).latents
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


BAD: Mapping[str, tuple[Any, str]] = {
    "none": (None, "the model edits images; give `reference_latents`"),
    "an empty list": ([], "the model edits images; give `reference_latents`"),
    "three": ([REFERENCES[0]] * 3, "are of 3 images, more than the 2 that the engine directory"),
    "other channels": (np.ones((2, 4, 8, 6), np.float32), "latents of this model have 16 channels"),
    "an odd height": (np.ones((1, 16, 7, 6), np.float32), "2 must divide height and width"),
    "too large": (np.ones((1, 16, 8, 14), np.float32), "28 tokens, more than the 24 of"),
    "three rows": (np.ones((3, 16, 8, 6), np.float32), "with 1 or 2 for N, because 2 images"),
    "whole numbers": (np.ones((1, 16, 8, 6), np.int64), "int64 .*, expected floating point"),
    "no height": (np.ones((1, 16, 0, 6), np.float32), "2 must divide height and width"),
    "infinite": (np.full((1, 16, 8, 6), np.inf, np.float32), "holds NaN or infinite values"),
    "a picture": (np.ones((8, 6, 3), np.float32), r"\[8, 6, 3\], expected floating point"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_references_are_refused(engine: Path, case: str) -> None:
    given, message = BAD[case]
    with (
        goc_deploy.load(engine, plan="none") as pipe,
        pytest.raises(UsageError, match=message),
    ):
        pipe.generate(prompt_embeds=captions_of(pipe.spec), reference_latents=given)


def test_files_with_other_arrays_are_refused(engine: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "captions.npz", **arrays())
    for names in (("latents",), ("reference_latents", "reference_latents_3"), ()):
        np.savez(tmp_path / "bad.npz", **dict.fromkeys(names, REFERENCES[0]))
        options = RunOptions(
            prompt_embeds=tmp_path / "captions.npz", reference_latents=tmp_path / "bad.npz"
        )
        with pytest.raises(UsageError, match=r"bad.npz must hold reference_latents \[N,C,H,W\]"):
            run(engine, options)


def test_exports_that_do_not_fit_are_refused(folder: Path, judge: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "captions.npz", **arrays())
    small = {"size": SIZE, "plans": ["none"], "steps": 2}
    with pytest.raises(UsageError, match="`captions` are not stored for a model that edits images"):
        goc_deploy.export(folder, tmp_path / "e", captions=tmp_path / "captions.npz", **small)
    with pytest.raises(UsageError, match=r"`max_references=17` must be within 1\.\.16"):
        goc_deploy.export(folder, tmp_path / "e", max_references=17, **small)
    with pytest.raises(UsageError, match="this model reads no reference images"):
        goc_deploy.export(folder / "transformer", tmp_path / "e", max_references=2, **small)
    config = {**json.loads(judge.to_json_string()), "zero_cond_t": True}
    with pytest.raises(ModelError, match="zero_cond_t is True, only False"):
        spec_from_config(config, "config.json")


def test_the_transformer_alone_edits_if_the_model_is_named(pipeline: Any, tmp_path: Path) -> None:
    folder = save_pipeline(pipeline, tmp_path / "plus", "QwenImageEditPlusPipeline")
    of_plus = read_model_folder(folder, ARCHITECTURES).spec
    assert of_plus.architecture == "qwen-image-edit"
    named = read_model_folder(folder / "transformer", {"qwen-image-edit": QWEN_IMAGE_EDIT})
    assert named.spec == of_plus
    alone = read_model_folder(folder / "transformer", ARCHITECTURES).spec
    assert (alone.architecture, alone.max_references) == ("qwen-image", 0)
    assert checked_references(None, 2, alone) == ()
    with pytest.raises(UsageError, match="`reference_latents` are for models that edit images"):
        checked_references(REFERENCES[0], 2, alone)
    tensors = pipeline.transformer.state_dict()
    assert not QWEN_IMAGE_EDIT.matches(list(tensors))
    assert QWEN_IMAGE_EDIT.spec_from_tensors(tensors, None) == of_plus
    QWEN_IMAGE_EDIT.check_tensors(tensors, of_plus)
