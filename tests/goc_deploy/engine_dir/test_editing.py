from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from goc_deploy import disk
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.errors import ConflictError, ResourceError

NEW = "engines/folder/new.cache"


# Amends a copy of an engine directory again and again; the process dies one write later each time.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from goc_deploy.engine_dir.editing import Amendment, amended

def dying(write):
    def write_or_die(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **options)
    return write_or_die

source, folder, path = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
status, number = None, 0
while status != 0:
    copy = Path(shutil.copytree(source, folder / str(number)))
    child = os.fork()
    if not child:
        left = number
        for name in ("replace", "fsync", "mkdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        amended(copy, "testing", lambda current: Amendment(current.manifest, {path: b"new"}))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    number += 1
"""


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_engine, tmp_path / "engine"))


def with_new(current: EngineDir, content: bytes = b"new") -> Amendment:
    return Amendment(current.manifest, {NEW: content})


def files_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_a_file_is_added_and_then_replaced_and_what_is_returned_is_what_is_there(
    engine: Path,
) -> None:
    for content in (b"new", b"newer"):
        after = amended(engine, "testing", lambda current, c=content: with_new(current, c))
        assert bytes(after.read(NEW)) == content
        assert after == EngineDir.open(engine)
        assert [file.path for file in after.manifest.files].count(NEW) == 1


def test_a_removed_file_is_neither_listed_nor_there(engine: Path) -> None:
    amended(engine, "testing", with_new)
    after = amended(
        engine, "testing", lambda current: Amendment(current.manifest, {}, frozenset({NEW}))
    )
    assert NEW not in after
    assert not (engine / NEW).exists()
    assert EngineDir.open(engine) == after


def test_no_amendment_writes_nothing(engine: Path) -> None:
    before = files_of(engine)
    assert amended(engine, "testing", lambda _: None) == EngineDir.open(engine)
    assert files_of(engine) == before


def test_a_refused_change_writes_nothing(engine: Path) -> None:
    def refused(_: EngineDir) -> Amendment:
        raise ConflictError("it was replaced")

    before = files_of(engine)
    with pytest.raises(ConflictError, match="it was replaced"):
        amended(engine, "testing", refused)
    assert files_of(engine) == before


def test_the_change_sees_what_others_wrote_since_the_directory_was_opened(engine: Path) -> None:
    before = EngineDir.open(engine)
    amended(engine, "testing", with_new)
    seen: list[bool] = []
    amended(engine, "testing", lambda current: seen.append(NEW in current))
    assert NEW not in before
    assert seen == [True]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_directory_as_it_was(
    engine: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException
) -> None:
    replaced: list[str] = []
    real_replace = os.replace

    def failing(source: Path, target: Path) -> None:
        replaced.append(Path(target).name)
        if len(replaced) > step:
            raise error
        real_replace(source, target)

    before = files_of(engine)
    monkeypatch.setattr(disk.os, "replace", failing)
    with pytest.raises((ResourceError, KeyboardInterrupt)):
        amended(engine, "testing", with_new)
    assert replaced == ["new.cache", MANIFEST_NAME][: step + 1]
    assert files_of(engine) == before


def test_an_interruption_right_after_the_manifest_was_replaced_keeps_what_it_lists(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        real_replace(source, target)
        if Path(target).name == MANIFEST_NAME:
            raise KeyboardInterrupt

    monkeypatch.setattr(disk.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        amended(engine, "testing", with_new)
    assert bytes(EngineDir.open(engine).read(NEW)) == b"new"


def test_a_process_that_is_killed_at_any_write_leaves_a_whole_directory(
    golden_engine: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", KILLED, str(golden_engine), str(tmp_path), NEW]
    subprocess.run(words, check=True, timeout=300)
    listed = []
    for number in range(len([*tmp_path.glob("[0-9]*")])):
        directory = EngineDir.open(tmp_path / str(number))
        listed.append(NEW in directory)
        for file in directory.manifest.files:
            directory.read(file.path)
        assert bytes(amended(directory.path, "testing", with_new).read(NEW)) == b"new"
    assert listed == sorted(listed)
    assert len(listed) > 5
    assert listed[0] is False
    assert listed[-1] is True
