"""Skip-layer guidance of a DiT, whose rows of the modulation table belong to labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures.dit_model import DiT, modulate
from goc_deploy.exporters.skip_guidance import with_skip_guidance
from goc_deploy.protocols import Buffer
from goc_deploy.runtime import buffers, modulation_buffers
from goc_deploy.runtime.noise import image_noise
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.reference import relative_l2, table_step, unpatchify

SPEC = ModelSpec(3, 48, 3, 192, 2, 4, 4, 10, True)
STEPS, LABELS, SCALE, CHANNELS, LAYER = 8, [7, 1], 3.0, 3, 1
WINDOW = (2.0, 0.1, 0.7)  # the steps 1 to 5
PLANS = ("none", "fora:2+gc:1.0", "fora:3+gc:0.5,level=residual")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    folder = tmp_path_factory.mktemp("skips")
    torch.save(random_state(SPEC, 3), folder / "dit.pt")
    sizes = ["--num-heads", "3", "--steps", str(STEPS), "--max-batch", "2"]
    plans = [word for plan in PLANS for word in ("--plan", plan)]
    words = [*sizes, *plans, "--skip-guidance-layers", str(LAYER)]
    command("goc-export", str(folder / "dit.pt"), "-o", str(folder / "engine"), *words)
    return folder / "engine"


class Pass:
    """Calls of a model that share a cache.

    Args:
        schedule: what is computed and predicted.
        left_out: the block that is skipped, or None.
    """

    def __init__(self, model: DiT, schedule: Schedule, left_out: int | None) -> None:
        self._model, self._schedule, self._left_out = model, schedule, left_out
        self._history: dict[int, list[torch.Tensor]] = {}

    def _used(self, place: int, row: tuple[float, ...], computed: torch.Tensor) -> torch.Tensor:
        kept = self._history.setdefault(place, [])
        parts = [c * g for c, g in zip(row, kept, strict=False)]
        kept.insert(0, torch.stack(parts).sum(dim=0) if row else computed)
        return kept[0]

    def __call__(self, step: int, x: torch.Tensor, t: float, labels: list[int]) -> torch.Tensor:
        model, rows = self._model, self._schedule.coefficients[step]
        times, by_unit = torch.full((len(x),), t), self._schedule.level == "unit"
        condition = model.t_embedder(times) + model.y_embedder(torch.tensor(labels))
        start = h = model.x_embedder(x) + model.pos_embed
        for unit in range(SPEC.units):
            if unit // 2 == self._left_out:
                continue
            block, part = model.blocks[unit // 2], 3 * (unit % 2)
            shift, scale, gate = block.adaLN_modulation(condition).chunk(6, 1)[part : part + 3]
            feature = (block.mlp if part else block.attn)(modulate(h, shift, scale))
            used = self._used(unit, rows[unit], feature) if by_unit else feature
            h = h + gate.unsqueeze(1) * used
        if not by_unit:
            h = start + self._used(0, rows[0], h - start)
        shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
        output = unpatchify(model.final_layer.linear(modulate(h, shift, scale)), SPEC)
        return output[:, : SPEC.channels]


@torch.inference_mode()
def eager_latents(pipe: Pipeline, noise: np.ndarray) -> np.ndarray:
    model = DiT(SPEC).eval()
    model.load_state_dict(random_state(SPEC, 3))
    table, schedule = pipe.plan.sampler, pipe.plan.schedule
    assert schedule.history == "used"
    whole, shorter = (Pass(model, schedule, left_out) for left_out in (None, LAYER))
    x, step_of = table.start * torch.from_numpy(noise), table_step(table)
    scale, start, stop = WINDOW
    for step, t in enumerate(table.timesteps):
        nulls = [SPEC.choices] * len(LABELS)
        cond, uncond = whole(step, torch.cat([x, x]), float(t), [*LABELS, *nulls]).chunk(2)
        guided = uncond + SCALE * (cond - uncond)
        if step < stop * STEPS:
            skipped = shorter(step, x, float(t), LABELS)
            guided += scale * (cond - skipped) * (step > start * STEPS)
        guided[:, CHANNELS:] = cond[:, CHANNELS:]
        zeros = torch.zeros_like(x)
        x = step_of(step, x, guided, zeros, zeros)
    return x.numpy()


@pytest.mark.parametrize("plan", PLANS)
def test_latents_are_those_of_two_passes_in_pytorch(engine: Path, plan: str) -> None:
    noise = np.stack([image_noise(5, i, 1, SPEC.latents)[0] for i in range(2)])
    with goc_deploy.load(engine, plan=plan) as pipe:
        more = {"seed": 5, "cfg_scale": SCALE, "cfg_channels": CHANNELS}
        found = pipe.generate(LABELS, skip_layer_guidance=WINDOW, **more)
        usual = pipe.generate(LABELS, **more)
        alone = pipe.generate([LABELS[0]], skip_layer_guidance=WINDOW, **more)
        expected = eager_latents(pipe, noise)
    assert found.report["skip_layer_steps"] == [1, 2, 3, 4, 5]
    assert "skip_layer_steps" not in usual.report
    assert relative_l2(found.latents, expected) < 1e-5
    assert relative_l2(alone.latents, expected[:1]) < 1e-5
    assert relative_l2(usual.latents, expected) > 1e-3


def test_a_table_that_is_filled_again_at_every_step_draws_the_same(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for budget in (modulation_buffers.TABLE_BUDGET_BYTES, 1):
        monkeypatch.setattr(modulation_buffers, "TABLE_BUDGET_BYTES", budget)
        with goc_deploy.load(engine, plan="fora:2+gc:1.0") as pipe:
            results.append(pipe.generate(LABELS, seed=5, skip_layer_guidance=WINDOW).latents)
    assert relative_l2(results[1], results[0]) < 1e-6


def test_sums_that_start_with_more_rows_take_the_place_of_features(engine: Path) -> None:
    results = {}
    for history in ("features", "sums"):
        with goc_deploy.load(engine, plan="fora:2+gc:1.0", history=history) as pipe:
            results[history] = pipe.generate(LABELS, seed=5, skip_layer_guidance=WINDOW).latents
            targets = [pipe.plan.targets(step) for step in range(STEPS)]
        if history == "sums":  # gates that were fetched with more rows are read with fewer
            assert set(targets[0]) & set(targets[6])
    assert relative_l2(results["sums"], results["features"]) < 1e-5


def test_planned_bytes_include_its_rows(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, planned = [], []
    with goc_deploy.load(engine, plan="fora:2+gc:1.0") as pipe:
        backend = pipe.backend
        allocate = backend.allocate
        for spec in (pipe.spec, replace(pipe.spec, skip_guidance_layers=())):
            kept: list[int] = []

            def counted(shape: Sequence[int], dtype: str, kept: list[int] = kept) -> Buffer:
                buffer = allocate(shape, dtype)
                kept.append(buffer.nbytes)
                return buffer

            monkeypatch.setattr(backend, "allocate", counted)
            buffers.allocate_buffers(backend, spec, "fp32", pipe.plan, 2)
            allocated.append(sum(kept))
            planned.append(buffers.planned_bytes(spec, "fp32", pipe.plan, 2))
    indices = 8 * 2 * 4  # of two more rows
    assert allocated[0] - allocated[1] - indices == planned[0] - planned[1] > 100_000


def test_requests_without_it_draw_what_an_engine_without_it_draws(
    engine: Path, tmp_path: Path
) -> None:
    source, plan = engine.parent / "dit.pt", "fora:2+gc:1.0"
    more: dict[str, Any] = {"num_heads": 3, "steps": STEPS, "max_batch": 2, "plans": [plan]}
    goc_deploy.export(source, tmp_path / "usual", **more)
    with goc_deploy.load(tmp_path / "usual") as pipe:
        expected = pipe.generate(LABELS, seed=5).latents
        with pytest.raises(UsageError, match="export it with `skip_guidance_layers`"):
            pipe.generate(LABELS, skip_layer_guidance=2.8)
    with goc_deploy.load(engine, plan=plan) as pipe:
        for given in (None, WINDOW, None):
            found = pipe.generate(LABELS, seed=5, skip_layer_guidance=given).latents
            assert np.array_equal(found, expected) == (given is None)


def test_the_commands_have_it(engine: Path, tmp_path: Path, command: Command) -> None:
    shown = command("goc-plan", str(engine), "--inspect").stdout
    assert f"skip-layer guidance leaves out the blocks {LAYER}\n" in shown
    report, latents = tmp_path / "report.json", tmp_path / "latents.npy"
    words = ["--plan", "fora:2+gc:1.0", "--labels", "7,1", "--latents-output", str(latents)]
    run = ["goc-run", str(engine), *words, "--report", str(report), "--skip-layer-guidance"]
    command(*run, "2.5:0.01:0.5")
    written = json.loads(report.read_text())
    assert (written["skip_layer_guidance"], written["skip_layer_steps"]) == (2.5, [1, 2, 3])
    with goc_deploy.load(engine, plan="fora:2+gc:1.0") as pipe:
        expected = pipe.generate(LABELS, skip_layer_guidance=(2.5, 0.01, 0.5)).latents
    np.testing.assert_array_equal(np.load(latents), expected)
    refused = command(*run, "2.5:0.1", code=2).stderr
    assert "must be a scale, or SCALE:START:STOP such as 2.8:0.01:0.2" in refused
    refused = command(*run, "2.5", "--cfg-scale", "1", code=2).stderr
    assert "--skip-layer-guidance adds to the guidance of an image" in refused


def test_layers_of_a_model_whose_images_share_their_modulation_are_refused() -> None:
    pixart = ModelSpec(
        4, 48, 3, 192, 2, 4, 4, 0, True, "pixart", ("attn", "cross", "mlp"), caption_channels=8,
        caption_tokens=5,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"depends on the image.*not for pixart"):
        with_skip_guidance(pixart, (1,))
    assert with_skip_guidance(pixart, ()) is pixart
