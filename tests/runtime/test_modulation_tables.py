"""Modulation that is stored for a plan: no graph is loaded for it, and no result changes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goc_deploy
from goc_deploy.api import add_plan
from goc_deploy.api.engines import cpu_backend
from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.display.engines import graph_rows
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.errors import EngineDirError
from goc_deploy.exporters.graphs.modulation import write_table
from goc_deploy.runtime import modulation_tables
from goc_deploy.runtime.needed_graphs import needed_graphs
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2
from tests.qwen_folder import random_qwen
from tests.stand_ins.onnxruntime import cuda_pipeline

pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself

PLANS = ("none", "fora:2+gc:1.0")
USUAL, TURNED, OTHER = (80, 48), (48, 80), (48, 64)  # width and height; the turned has equal steps
WEIGHTS = "onnx/conditioning.weights"
MISSING = r"onnx/conditioning\.weights is missing; export again"
SCHEDULER = {  # of the public models
    "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True,
    "base_shift": 0.5, "max_shift": 0.9, "shift": 1.0, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image whose timesteps depend on the size of an image."""
    folder = tmp_path_factory.mktemp("tables")
    model = folder / "model"
    random_qwen().save_pretrained(model / "transformer")
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (model / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    options: dict[str, Any] = {"plans": PLANS, "steps": 4, "max_batch": 1, "max_size": (96, 80)}
    goc_deploy.export(model, folder / "engine", size=USUAL, **options)
    return folder / "engine"


@pytest.fixture
def copied(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copied"))


def publish(path: Path, manifest: Manifest, changed: Sequence[str] = ()) -> Path:
    """Write the manifest of a directory in which files have changed."""
    listed = [entry.path for entry in manifest.files]
    files = tuple(
        file_entry(path, entry.path) if entry.path in changed else entry for entry in manifest.files
    ) + tuple(file_entry(path, name) for name in changed if name not in listed)
    (path / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, files=files)))
    return path


def without_tables(path: Path) -> Path:
    return publish(path, replace(EngineDir.open(path).manifest, tables={}))


def without_weights(path: Path) -> Path:
    (path / WEIGHTS).unlink()
    return path


def tuned(path: Path) -> Path:
    """The same model with other weights of the modulation, and the table of these."""
    weights = np.memmap(path / WEIGHTS, np.float32, "r+")
    weights *= 1.25
    weights.flush()
    manifest = replace(EngineDir.open(path).manifest, tables={})
    publish(path, manifest, [WEIGHTS])
    opened = EngineDir.open(path)
    manifest = write_table(path, opened.plan("none"), opened.manifest, opened.read, cpu_backend)
    return publish(path, manifest, tuple(manifest.tables.values()))


def captions_of(spec: ModelSpec) -> PromptEmbeds:
    draw = np.random.default_rng(1).standard_normal
    arrays = {name: draw((1, 7, 40)) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return prompt_embeds_from_arrays(arrays, spec, "")


def drawn(pipe: Pipeline, size: tuple[int, int] = USUAL) -> np.ndarray:
    captions = captions_of(pipe.spec)
    return pipe.generate(prompt_embeds=captions, size=size, seed=3, cfg_scale=4.0).latents


def drawn_from(path: Path, size: tuple[int, int] = USUAL) -> np.ndarray:
    with goc_deploy.load(path, plan=PLANS[1]) as pipe:
        return drawn(pipe, size)


def test_plans_of_the_same_timesteps_share_a_table(engine: Path) -> None:
    directory = EngineDir.open(engine)
    (path,) = directory.manifest.tables.values()
    spec = directory.manifest.model
    values = 4 * spec.modulation.count * spec.hidden
    assert values * 4 < directory.size(path) < values * 4 + 256
    assert directory.size(path) < directory.size(WEIGHTS) / 20
    plans = [directory.plan(plan) for plan in PLANS]
    needed = needed_graphs(directory, plans, cpu_backend()).units
    assert "captions" in needed
    assert "conditioning" not in needed
    (row,) = [row for row in graph_rows(directory)[1] if row[0].startswith("modulation table")]
    assert row[2] == f"{directory.size(path) / 1e6:.2f}"


def test_results_are_those_of_the_graph_to_the_last_bit(
    engine: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One pipeline draws several sizes in turn; one of other timesteps loads the graph once."""
    without_tables(copied)
    with (
        goc_deploy.load(engine, plan=PLANS[1]) as stored,
        goc_deploy.load(copied, plan=PLANS[1]) as computed,
    ):
        assert "conditioning" not in stored.engines.units
        assert "conditioning" in computed.engines.units
        for size, loads in ((USUAL, 0), (OTHER, 1), (TURNED, 0), (OTHER, 0), (USUAL, 0)):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "goc_deploy"):
                np.testing.assert_array_equal(drawn(stored, size), drawn(computed, size))
            messages = [r.getMessage() for r in caplog.records]
            assert len(messages) == loads, messages
            assert all("stores no modulation for the 4 timesteps" in m for m in messages)


def test_the_computed_tables_of_the_last_sizes_are_kept(
    engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(modulation_tables, "MAX_COMPUTED", 2)
    sizes = [OTHER, (48, 48), OTHER, (64, 64), OTHER, (48, 48)]  # the last was dropped meanwhile
    with goc_deploy.load(engine, plan=PLANS[1]) as pipe:
        for size, loads in zip(sizes, (1, 1, 0, 1, 0, 1), strict=True):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "goc_deploy"):
                drawn(pipe, size)
            assert len(caplog.records) == loads, size


def test_a_directory_runs_without_the_graph_of_stored_modulation(
    engine: Path, copied: Path
) -> None:
    without_weights(copied)
    expected = {size: drawn_from(engine, size) for size in (USUAL, TURNED)}
    with goc_deploy.load(copied, plan=PLANS[1]) as pipe:
        for _ in range(2):
            for size in (USUAL, TURNED):
                np.testing.assert_array_equal(drawn(pipe, size), expected[size])
            with pytest.raises(EngineDirError, match=MISSING):
                drawn(pipe, OTHER)


def test_a_plan_that_is_compiled_at_the_load_reads_the_graph(engine: Path, copied: Path) -> None:
    without_tables(copied)
    found = []
    for path in (engine, copied):
        with goc_deploy.load(path, plan="fora:3", steps=6) as pipe:
            assert "conditioning" in pipe.engines.units
            found.append(drawn(pipe))
    np.testing.assert_array_equal(*found)
    without_weights(copied)
    with pytest.raises(EngineDirError, match=MISSING):
        goc_deploy.load(copied, plan="fora:3", steps=6)


def test_a_plan_that_is_added_has_its_table(copied: Path) -> None:
    before = EngineDir.open(copied).manifest.tables
    add_plan(copied, "fora:3")
    assert EngineDir.open(copied).manifest.tables == before
    add_plan(copied, "fora:3", name="longer", steps=6)
    directory = EngineDir.open(copied)
    assert len(directory.manifest.tables) == 2
    with goc_deploy.load(copied, plan="longer") as pipe:
        assert "conditioning" not in pipe.engines.units
        found = drawn(pipe)
    without_tables(copied)
    with goc_deploy.load(copied, plan="longer") as pipe:
        np.testing.assert_array_equal(found, drawn(pipe))


def test_without_the_graph_only_plans_of_the_same_timesteps_are_added(copied: Path) -> None:
    without_weights(copied)
    add_plan(copied, "fora:3")
    assert drawn_from(copied).shape == (1, 16, 6, 10)
    with pytest.raises(
        EngineDirError,
        match=r"plan longer needs the modulation of its timesteps, which no other plan has, .*"
        + MISSING,
    ):
        add_plan(copied, "fora:3", name="longer", steps=6)
    assert [plan.name for plan in EngineDir.open(copied).plans()][-1] == "fora-3"


def test_a_corrupt_table_is_refused(copied: Path) -> None:
    manifest = EngineDir.open(copied).manifest
    (name,) = manifest.tables.values()
    path = copied / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineDirError, match=rf"{name} was changed after the export"):
        goc_deploy.load(copied)
    path.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    publish(copied, manifest, [name])
    with pytest.raises(EngineDirError, match=rf"{name}: table\[3\]: a value is not finite"):
        goc_deploy.load(copied)
    path.write_bytes(content[: len(content) // 2])
    publish(copied, manifest, [name])
    with pytest.raises(EngineDirError, match=rf"{name}: expected one tensor 'table', float32"):
        goc_deploy.load(copied)
    path.unlink()
    with pytest.raises(EngineDirError, match=rf"{name} is missing; export again"):
        goc_deploy.load(copied)


def test_exchanged_weights_bring_their_modulation(engine: Path, copied: Path) -> None:
    """The other directory has a table, then only the graph, then neither."""
    tuned(copied)
    wanted = {
        path: {size: drawn_from(path, size) for size in (USUAL, OTHER)} for path in (engine, copied)
    }
    assert relative_l2(wanted[copied][USUAL], wanted[engine][USUAL]) > 0.01
    with goc_deploy.load(engine, plan=PLANS[1]) as pipe:
        drawn(pipe)
        for path in (copied, engine, without_tables(copied)):
            pipe.load_weights(path)
            for size in (USUAL, OTHER):
                np.testing.assert_array_equal(drawn(pipe, size), wanted[path][size])
        pipe.load_weights(engine)
        without_weights(copied)
        with pytest.raises(EngineDirError, match=MISSING):
            pipe.load_weights(copied)
        np.testing.assert_array_equal(drawn(pipe), wanted[engine][USUAL])


def test_steps_that_share_launches_read_the_stored_table(engine: Path) -> None:
    pipe, _ = cuda_pipeline(engine, PLANS[1])
    with pipe:
        for size in (USUAL, OTHER, USUAL):
            for _ in range(2):  # the second run replays recorded steps
                assert relative_l2(drawn(pipe, size), drawn_from(engine, size)) < 1e-5
