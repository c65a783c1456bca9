from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import goc_deploy
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.errors import EngineDirError, SafetyError, UsageError
from tests.manifest_reads import count_reads


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_engine, tmp_path / "engine"))


def test_what_is_no_engine_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineDirError, match="is not a directory"):
        EngineDir.open(tmp_path / "nothing")
    with pytest.raises(EngineDirError, match=r"has no manifest.json"):
        EngineDir.open(tmp_path)


def test_files_are_read_as_the_manifest_lists_them(engine: Path) -> None:
    directory = EngineDir.open(engine)
    path = directory.manifest.graphs[0].onnx
    content = (engine / path).read_bytes()
    assert path in directory
    assert "onnx/nothing.onnx" not in directory
    assert bytes(directory.read(path)) == content
    assert directory.size(path) == len(content)
    assert directory.file(path).sha256 == directory.sha256(path)


@pytest.mark.parametrize("damage", ["changed", "truncated", "link"])
def test_a_file_that_changes_after_the_directory_was_opened_is_refused(
    engine: Path, damage: str
) -> None:
    directory = EngineDir.open(engine)
    path = directory.manifest.graphs[0].onnx
    content = (engine / path).read_bytes()
    if damage == "link":
        (engine / path).rename(engine / "elsewhere")
        (engine / path).symlink_to(engine / "elsewhere")
    else:
        (engine / path).write_bytes(content[:-1] + (b"?" if damage == "changed" else b""))
    with pytest.raises(SafetyError if damage == "link" else EngineDirError):
        directory.read(path)


def test_every_plan_is_read_in_the_order_of_the_manifest(golden_engine: Path) -> None:
    directory = EngineDir.open(golden_engine)
    names = [entry.name for entry in directory.manifest.plans]
    assert [plan.name for plan in directory.plans()] == names
    assert directory.plan(None).name == next(name for name in names if name != "none")


def test_a_plan_that_is_not_there_is_refused_with_what_to_do(engine: Path) -> None:
    directory = EngineDir.open(engine)
    with pytest.raises(UsageError, match=rf"add it with: goc plan {engine} fora:7"):
        directory.plan("fora:7")
    with pytest.raises(EngineDirError, match=rf"goc plan {engine} none"):
        EngineDir(engine, replace(directory.manifest, plans=())).plan(None)


@pytest.mark.parametrize(
    ("options", "reads"), [({}, 1), ({"plan": "fora:2"}, 1), ({"plan": "fora:4"}, 1)]
)
def test_loading_reads_the_manifest_once(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], reads: int
) -> None:
    opened = count_reads(monkeypatch)
    goc_deploy.load(golden_engine, backend="onnxruntime", **options).close()
    assert len(opened) == reads


def test_adding_a_calibrated_plan_reads_the_manifest_once_before_and_once_under_the_lock(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_reads(monkeypatch)
    goc_deploy.add_plan(engine, "fora:2+goc", calibrate=1, name="calibrated")
    assert len(opened) == 2


def test_a_manifest_that_names_files_outside_is_refused(engine: Path) -> None:
    manifest = EngineDir.open(engine).manifest
    outside = replace(manifest.files[0], path="../outside")
    (engine / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, files=(outside,))))
    with pytest.raises(SafetyError, match="may lie outside the directory"):
        EngineDir.open(engine)


def test_a_plan_that_computes_what_its_schedule_does_not_is_refused(golden_engine: Path) -> None:
    manifest = EngineDir.open(golden_engine).manifest
    none, fora = manifest.plans[0], manifest.plans[1]
    mixed = replace(none, schedule=fora.schedule)
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for at step 1"):
        EngineDir(golden_engine, replace(manifest, plans=(mixed,))).plan(none.name)


def test_a_plan_with_other_coefficients_than_its_schedule_is_refused(golden_engine: Path) -> None:
    manifest = EngineDir.open(golden_engine).manifest
    gradients = [entry for entry in manifest.plans if "+gc" in entry.policy]
    assert len(gradients) == 2
    mixed = replace(gradients[0], schedule=gradients[1].schedule)
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for"):
        EngineDir(golden_engine, replace(manifest, plans=(mixed,))).plan(mixed.name)
