from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goc_deploy import disk
from goc_deploy.disk import (
    check_free_space,
    check_parent,
    directory_lock,
    replacing,
    scratch_folder,
    staged,
)
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_from_json, manifest_to_json
from goc_deploy.engine_dir.reading import check_target, file_entry, read_manifest, read_verified
from goc_deploy.errors import ConflictError, EngineDirError, ResourceError, SafetyError


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "engine") as stage:
        (stage / "a").write_text("new")
        assert not (tmp_path / "engine").exists()
    assert (tmp_path / "engine" / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["engine"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_existing_directory_is_swapped_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: object())
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "old").touch()
    with staged(tmp_path / "engine") as stage:
        (stage / "new").touch()
    assert os.listdir(tmp_path / "engine") == ["new"]
    assert os.listdir(tmp_path) == ["engine"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_directory_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "old").touch()

    def write_and_fail() -> None:
        with staged(tmp_path / "engine") as stage:
            (stage / "new").touch()
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert os.listdir(tmp_path / "engine") == ["old"]
    assert os.listdir(tmp_path) == ["engine"]


def test_missing_parents_of_a_locked_directory_stay_if_the_work_ends_well(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b" / "engine"

    def fail() -> None:
        with directory_lock(directory):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == []
    with directory_lock(directory), staged(directory):
        pass
    assert os.listdir(tmp_path / "a" / "b") == ["engine"]


def test_a_parent_that_somebody_else_uses_too_is_kept(tmp_path: Path) -> None:
    def fail() -> None:
        with directory_lock(tmp_path / "a" / "engine"):
            (tmp_path / "a" / "other").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path / "a") == ["other"]


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConflictError, match=r"file is not a directory, so .*engine cannot be made"):
        check_parent(tmp_path / "file" / "b" / "engine")
    check_parent(tmp_path / "a" / "b" / "engine")


def test_a_lock_that_is_held_is_a_conflict_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LOCK_SECONDS", 0.1)
    second = directory_lock(tmp_path / "engine")
    with (
        directory_lock(tmp_path / "engine"),
        pytest.raises(ConflictError, match="another process is writing"),
        second,
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    check_free_space(tmp_path / "engine", 1)
    with pytest.raises(ResourceError, match="GB free but the engine needs"):
        check_free_space(tmp_path / "engine", 10**18)


@given(st.integers(0, 99), st.integers(1, 255))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_noticed(tmp_path: Path, place: int, change: int) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    entry = file_entry(tmp_path, "f")
    assert bytes(read_verified(tmp_path, entry)) == bytes(range(100))
    content = bytearray(range(100))
    content[place] ^= change
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(EngineDirError, match="was changed after the export"):
        read_verified(tmp_path, entry)


def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    entry = file_entry(tmp_path, "f")
    (tmp_path / "f").unlink()
    os.mkfifo(tmp_path / "f")
    with pytest.raises(SafetyError, match="not a plain file"):
        read_verified(tmp_path, entry)


def test_saving_and_loading_a_manifest_is_the_identity(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    assert manifest_from_json(manifest_to_json(manifest).encode(), "test") == manifest


def test_the_manifest_says_where_the_engine_comes_from_and_no_path_of_this_machine(
    golden_engine: Path,
) -> None:
    manifest = read_manifest(golden_engine)
    assert manifest.provenance["checkpoint"] == "model.pt"
    assert len(manifest.provenance["checkpoint_sha256"]) == 64
    assert manifest.provenance["options"]["num_heads"] == 4
    errors = [unit.relative_l2 for unit in manifest.graphs if unit.weights_file]
    assert 0 < max(errors) < 1e-5
    text = "".join(path.read_text() for path in golden_engine.rglob("*.json"))
    assert str(Path.home()) not in text
    assert str(golden_engine.parent) not in text
    graphs = b"".join(path.read_bytes() for path in golden_engine.rglob("*.onnx"))
    assert b"site-packages" not in graphs
    assert b"exporters" not in graphs


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_a_manifest_crashes_the_reader(
    golden_engine: Path, data: st.DataObject
) -> None:
    text = (golden_engine / MANIFEST_NAME).read_bytes()
    found = json.loads(text)
    section = data.draw(st.sampled_from(sorted(found)))
    value = data.draw(
        st.one_of(
            st.none(),
            st.integers(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=3),
            st.just({}),
        )
    )
    found[section] = value
    damaged = data.draw(
        st.sampled_from(
            [json.dumps(found).encode(), text[: data.draw(st.integers(0, len(text) - 1))]]
        )
    )
    with contextlib.suppress(EngineDirError, SafetyError):
        manifest_from_json(damaged, "test")


GONE = 999_999_999  # no process has that number


def test_what_a_killed_writer_left_vanishes_with_the_next(tmp_path: Path) -> None:
    left, mine, foreign = (
        tmp_path / f".engine.tmp-{word}"
        for word in (f"{GONE}-0123abcd", f"{os.getpid()}-0123abcd", "x")
    )
    for folder in (left, mine, foreign):
        (folder / "onnx").mkdir(parents=True)
    with staged(tmp_path / "engine") as stage:
        assert not left.exists()
        (stage / "a").touch()
    assert mine.exists()
    assert foreign.exists()


def test_a_half_written_output_vanishes_with_the_next_unless_it_is_young(tmp_path: Path) -> None:
    old, young = (tmp_path / f".x.tmp-{GONE}-0123abc{digit}.png" for digit in "de")
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    with replacing(tmp_path / "x.png") as temporary:
        temporary.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "x.png"]


def test_a_scratch_folder_vanishes_and_takes_the_ones_of_the_dead_along(tmp_path: Path) -> None:
    (tmp_path / f".plan-{GONE}-0123abcd").mkdir()
    with scratch_folder(tmp_path, ".plan-") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_only_a_manifest_that_begins_as_ours_may_be_replaced(tmp_path: Path) -> None:
    for text in (
        '{"about": "goc_deploy.engine_dir"}',
        'notes on "format": "goc_deploy.engine_dir"',
        '["goc_deploy.engine_dir"]',
    ):
        (tmp_path / MANIFEST_NAME).write_text(text)
        with pytest.raises(ConflictError, match="not an engine directory that can be replaced"):
            check_target(tmp_path, force=True)
    (tmp_path / MANIFEST_NAME).write_text('{\n "format": "goc_deploy.engine_dir", cut sho')
    check_target(tmp_path, force=True)


def test_files_that_no_export_wrote_are_never_replaced(golden_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    (engine / f".plan-{GONE}-0123abcd").mkdir()
    (engine / f".plan-{GONE}-0123abcd" / "x").touch()
    check_target(engine, force=True)
    (engine / "notes.txt").write_text("mine")
    with pytest.raises(
        ConflictError, match=r"holds 'notes.txt', which no export wrote; move them away"
    ):
        check_target(engine, force=True)
