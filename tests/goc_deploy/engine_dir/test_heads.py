"""Plans with heads in an engine directory: their files, their graphs, and damage."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import goc_deploy
from goc_deploy.api.plans import publish_plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.errors import ConflictError, EngineDirError
from tests.heads import FORMS, add_head, plan_with_head

FILE = "plans/fora-2+patch3.head.safetensors"


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    target = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    add_head(target, "fora-2", FORMS["patch3"])
    return target


def test_a_plan_has_its_head_and_its_files_are_listed(engine: Path) -> None:
    directory = EngineDir.open(engine)
    manifest, form = directory.manifest, FORMS["patch3"]
    (entry,) = [entry for entry in manifest.plans if entry.head is not None]
    assert entry.head == FILE
    assert FILE in directory
    assert manifest.heads == {"sampler+patch3": "onnx/sampler+patch3.onnx"}
    assert "onnx/sampler+patch3.onnx" in [graph.onnx for graph in manifest.all_graphs()]
    plan = directory.plan(entry.name)
    assert plan == plan_with_head(directory.plan("fora-2"), form, manifest.model)
    assert directory.plan("fora-2").sampler.head is None


def test_an_equal_plan_is_recognised_and_another_head_is_not(engine: Path) -> None:
    directory = EngineDir.open(engine)
    plan = directory.plan("fora-2+patch3")
    assert publish_plan(directory, plan).name == plan.name
    assert EngineDir.open(engine).manifest == directory.manifest
    head = plan.sampler.head
    assert head is not None
    other = replace(head, weights=bytes(len(head.weights)))
    changed = replace(plan, sampler=replace(plan.sampler, head=other))
    with pytest.raises(ConflictError, match="already has another plan named"):
        publish_plan(directory, changed)
    with pytest.raises(ConflictError, match="already has another plan named"):
        publish_plan(directory, replace(plan, sampler=replace(plan.sampler, head=None)))


def test_heads_of_one_form_share_their_graph(engine: Path) -> None:
    before = EngineDir.open(engine).manifest.heads
    add_head(engine, "none", FORMS["patch3"])
    assert EngineDir.open(engine).manifest.heads == before
    add_head(engine, "none", FORMS["hidden1-0"])
    assert [*EngineDir.open(engine).manifest.heads] == [*before, "sampler+hidden1-0"]


def test_a_damaged_file_is_named(engine: Path) -> None:
    content = bytearray((engine / FILE).read_bytes())
    content[-1] ^= 1
    (engine / FILE).write_bytes(content)
    with pytest.raises(EngineDirError, match=r"head\.safetensors was changed after the export"):
        EngineDir.open(engine).plan("fora-2+patch3")
    os.unlink(engine / FILE)
    with pytest.raises(EngineDirError, match=r"head\.safetensors is missing"):
        EngineDir.open(engine).plan("fora-2+patch3")


def test_a_file_for_another_form_is_refused(engine: Path) -> None:
    manifest = EngineDir.open(engine).manifest
    add_head(engine, "fora-2", FORMS["scalar2"])
    (engine / FILE).write_bytes((engine / "plans/fora-2+scalar2.head.safetensors").read_bytes())
    files = tuple(file_entry(engine, file.path) for file in manifest.files)
    (engine / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, files=files)))
    with pytest.raises(EngineDirError, match=r"shape \[20, 8, 1\], but its form patch3 needs"):
        EngineDir.open(engine).plan("fora-2+patch3")


@pytest.mark.parametrize("field", ["head", "heads"])
def test_a_file_that_is_not_listed_is_refused(engine: Path, field: str) -> None:
    fields = json.loads((engine / MANIFEST_NAME).read_text())
    if field == "head":
        fields["plans"][-1]["head"] = "plans/x.safetensors"
        where = rf"\$\.plans\[{len(fields['plans']) - 1}\]\.head"
    else:
        fields["heads"]["sampler+patch3"] = "onnx/x.onnx"
        where = r"\$\.heads\.sampler\+patch3"
    (engine / MANIFEST_NAME).write_text(json.dumps(fields))
    with pytest.raises(EngineDirError, match=rf"{where}: .* is not in \$\.files"):
        EngineDir.open(engine)


def test_a_plan_whose_graph_is_not_listed_asks_to_be_added_again(engine: Path) -> None:
    manifest = EngineDir.open(engine).manifest
    (engine / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, heads={})))
    with pytest.raises(EngineDirError, match=r"no graph for 'sampler\+patch3', which a plan needs"):
        goc_deploy.load(engine, plan="fora-2+patch3", backend="onnxruntime")
