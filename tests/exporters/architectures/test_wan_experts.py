"""Wan 2.2 A14B: two transformers, each for a part of the steps, as in diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.api import load_plans
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.schedule import Schedule
from tests.conftest import Command
from tests.exporters.architectures.test_wan import arrays, captions_of, noise_of, padded, unipc
from tests.pixart_reference import Cache
from tests.reference import relative_l2

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "ffn_dim": 60,
    "num_layers": 2,
}
SECOND = "transformer_2"
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def transformer(seed: int) -> Any:
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**CONFIG).eval()
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1)
    return model


def scheduler_of(kind: str) -> Any:
    if kind == "unipc":
        return unipc(3.0)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return transformer(0), transformer(1)


def write_folder(folder: Path, models: tuple[Any, Any], kind: str) -> Path:
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    for name, model in zip(("transformer", SECOND), models, strict=True):
        model.save_pretrained(folder / name)
        index[name] = ["diffusers", "WanTransformer3DModel"]
    scheduler_of(kind).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=["unipc", "euler"])
def engine(
    request: pytest.FixtureRequest, models: tuple[Any, Any], tmp_path_factory: Any
) -> tuple[str, Path]:
    """The kind of scheduler, and an engine directory with plans of 10 and of 4 steps."""
    folder = tmp_path_factory.mktemp("experts")
    write_folder(folder / "pipeline", models, request.param)
    manifest = goc_deploy.export(
        folder / "pipeline", folder / "engine", plans=["none", "fora:2+gc:1.0"], steps=10,
        max_batch=2, size=(48, 32), frames=5,
    )  # fmt: skip
    assert manifest.model.boundary == 0.875
    assert max(graph.relative_l2 or 0 for graph in manifest.graphs) < 1e-4
    for plan in ("none", "fora:2+gc:1.0"):
        goc_deploy.add_plan(folder / "engine", plan, name=f"{plan[:4]}-4", steps=4)
    return request.param, folder / "engine"


class HookedPipeline:
    """A `WanPipeline` that takes features from caches as a schedule wants them.

    The conditional and the unconditional run of a step have a cache each, which starts anew where
    the second transformer begins.
    """

    def __init__(self, models: tuple[Any, Any], kind: str, schedule: Schedule) -> None:
        self._schedule, self._runs = schedule, -1
        self._caches = [Cache(schedule), Cache(schedule)]
        self._pipe = diffusers.WanPipeline(
            None, None, vae=None, scheduler=scheduler_of(kind), transformer=models[0],
            transformer_2=models[1], boundary_ratio=0.875,
        )  # fmt: skip
        self._pipe.set_progress_bar_config(disable=True)
        self._undo: list[Callable[[], None]] = []

    def _begin(self, *_: Any) -> None:
        self._runs += 1
        step, half = divmod(self._runs, 2)
        if step == self._schedule.switch:
            self._caches[half] = Cache(self._schedule)
        self._caches[half].step = step

    def _hook(self, layer: Any, unit: int) -> None:
        own = layer.forward
        layer.forward = lambda *args, **more: self._caches[self._runs % 2](
            unit, lambda: own(*args, **more)
        )
        self._undo.append(lambda: setattr(layer, "forward", own))

    def __enter__(self) -> HookedPipeline:
        for model in (self._pipe.transformer, self._pipe.transformer_2):
            self._undo.append(model.register_forward_pre_hook(self._begin).remove)
            for i, block in enumerate(model.blocks):
                for branch, layer in enumerate((block.attn1, block.attn2, block.ffn)):
                    self._hook(layer, 3 * i + branch)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def latents(self, given: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Final latents with scale 4 of the first transformer and 1.5 of the second."""
        negative = padded(given["negative_prompt_embeds"]).expand(len(noise), -1, -1)
        found = self._pipe(
            prompt_embeds=padded(given["prompt_embeds"]), negative_prompt_embeds=negative,
            height=32, width=48, num_frames=5, num_inference_steps=self._schedule.steps,
            guidance_scale=4.0, guidance_scale_2=1.5, latents=torch.from_numpy(noise),
            output_type="latent", return_dict=False,
        )  # fmt: skip
        latents: np.ndarray = found[0].numpy()
        return latents


@pytest.mark.parametrize("plan", ["none", "fora:2+gc:1.0", "none-4", "fora-4"])
def test_latents_are_those_of_the_pipeline_of_diffusers(
    models: tuple[Any, Any], engine: tuple[str, Path], plan: str
) -> None:
    kind, directory = engine
    noise = noise_of((2, 4, 6))
    results = {}
    for history in ("features", "sums"):
        with goc_deploy.load(directory, plan=plan, history=history) as pipe:
            given, captions, schedule = (
                arrays(pipe.spec),
                captions_of(pipe.spec),
                pipe.plan.schedule,
            )
            request = {"prompt_embeds": captions, "latents": noise}
            results[history] = pipe.generate(cfg_scale=4.0, cfg_scale_2=1.5, **request)
            other = pipe.generate(cfg_scale=4.0, **request).latents
    assert schedule.switch in (1, 2, 3, 4)
    assert (schedule.computed < schedule.steps * schedule.units) == plan.startswith("fora")
    with HookedPipeline(models, kind, schedule) as judge:
        expected = judge.latents(given, noise)
    for found in results.values():
        assert relative_l2(found.latents, expected) < 1e-4
    assert relative_l2(other, expected) > 1e-3
    assert results["sums"].report["cfg_scale_2"] == 1.5


def test_a_chunk_of_the_modulation_may_contain_the_switch(engine: tuple[str, Path]) -> None:
    """The tables of one, three and all steps give the latents of the stored table."""
    from goc_deploy.runtime.session import Session

    noise, results = noise_of((2, 4, 6)), []
    (pipe,) = load_plans(engine[1], ["fora:2+gc:1.0"], all_units=True)
    computing = replace(pipe.engines, tables=None)
    with pipe:
        assert pipe.engines.holds_table(pipe.plan)
        drawing = pipe.drawing(None, captions_of(pipe.spec), latents=noise)
        for engines, chunk in ((pipe.engines, None), *((computing, n) for n in (1, 3, None))):
            args = (engines, pipe.backend, pipe.spec, "fp32", pipe.plan, 2)
            session = Session(*args, chunk=chunk)
            results.append(session.run(drawing.request(range(2), 1))[0])
    assert max(relative_l2(other, results[0]) for other in results[1:]) < 1e-6


def test_one_scale_of_one_does_not_turn_guidance_off(engine: tuple[str, Path]) -> None:
    with goc_deploy.load(engine[1], plan="none-4") as pipe:
        request = {"prompt_embeds": captions_of(pipe.spec), "seed": 1}
        alone = pipe.generate(cfg_scale=1.0, **request).latents
        np.testing.assert_array_equal(
            pipe.generate(cfg_scale=1.0, cfg_scale_2=1.0, **request).latents, alone
        )
        late = pipe.generate(cfg_scale=1.0, cfg_scale_2=3.0, **request).latents
        early = pipe.generate(cfg_scale=3.0, cfg_scale_2=1.0, **request).latents
        assert min(relative_l2(late, alone), relative_l2(early, alone)) > 1e-4
        for wrong in (-1, [3.0, 3.0]):
            with pytest.raises(UsageError, match="cfg_scale_2 must be"):
                pipe.generate(cfg_scale_2=wrong, **request)  # type: ignore[arg-type]


def test_the_command_line_has_a_second_scale(
    engine: tuple[str, Path], golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    with goc_deploy.load(engine[1], plan="none-4") as pipe:
        np.savez(tmp_path / "c.npz", **arrays(pipe.spec))
        expected = pipe.generate(
            prompt_embeds=captions_of(pipe.spec), seed=4, cfg_scale_2=2.0
        ).latents
    words = ["--prompt-embeds", tmp_path / "c.npz", "--seed", "4", "--plan", "none-4"]
    output = ["--latents-output", tmp_path / "x.npy"]
    command("goc-run", engine[1], *words, "--cfg-scale-2", "2", *output)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    refused = command("goc-run", str(golden_engine), "--cfg-scale-2", "2", code=2)
    assert "--cfg-scale-2 is for models with two sets of weights" in refused.stderr


def test_calibration_is_refused(engine: tuple[str, Path]) -> None:
    with pytest.raises(UsageError, match="not supported for a model with two sets of weights"):
        goc_deploy.add_plan(engine[1], "fora:2+goc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_ratio": None}, "boundary_ratio must be a number between 0 and 1"),
        ({"boundary_ratio": 875.0}, "boundary_ratio must be a number between 0 and 1"),
        ({"ffn_dim": 64}, "ffn_dim is 64, but 60 in the first transformer"),
        ({"weights": None}, "has neither diffusion_pytorch_model.safetensors"),
        ({"loras": ["lora.safetensors"]}, "`loras` are not supported for a model with two sets"),
    ],
)
def test_what_does_not_fit_is_refused(
    models: tuple[Any, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path / "pipeline", models, "unipc")
    path = folder / ("model_index.json" if "boundary_ratio" in change else f"{SECOND}/config.json")
    loras = change.pop("loras", [])
    if "weights" in change:
        change.pop("weights")
        (folder / SECOND / "diffusion_pytorch_model.safetensors").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ModelError, UsageError), match=message):
        goc_deploy.export(folder, tmp_path / "e", steps=4, plans=["none"], loras=loras)
    shutil.rmtree(folder)
    assert not (tmp_path / "e").exists()
