from __future__ import annotations

import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.cli.paths import (
    check_distinct,
    check_folder,
    check_writable,
    dated_output,
)
from goc_deploy.conditions.labels import grid_columns, spread_labels
from goc_deploy.disk import save_array, save_text, written
from goc_deploy.errors import ConflictError, ResourceError, UsageError


def test_labels_are_repeated_in_order() -> None:
    assert spread_labels([3, 1], 5, 10) == [3, 1, 3, 1, 3]
    assert spread_labels(None, 12, 10) == [*range(10), 0, 1]
    assert spread_labels(None, None, 10) == list(range(8))
    assert spread_labels(None, None, 3) == [0, 1, 2]
    assert spread_labels([5, 5], None, 10) == [5, 5]


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (list(range(10)) * 4, 10),
        ([*range(10), *range(5)], None),
        ([1] * 9, None),
        ([1, 2, 1, 2, 1], 2),
        ([1, 2] * 10, 4),
        (list(range(30)) * 2, None),
        ([7], None),
    ],
)
def test_a_grid_has_a_row_per_repetition_where_that_looks_good(
    labels: list[int], columns: int | None
) -> None:
    assert grid_columns(labels) == columns


def test_a_dated_name_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(3):
        path = dated_output(".png")
        path.touch()
        names.add(path.name)
    assert len(names) == 3
    assert all(re.fullmatch(r"goc-\d{8}-\d{6}(-\d)?\.png", name) for name in names)


def test_an_output_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_text("old", path)

    def fail() -> None:
        with written(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    save_array(np.arange(3), tmp_path / "name.without.npy.ending")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name.without.npy.ending", "x.json"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "folder.png", "is a directory"),
        (tmp_path / "file" / "no" / "x.png", "is not a directory"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ConflictError, match=message):
            check_writable(path, may_be_folder=True)
    for good in (
        None,
        tmp_path / "new.png",
        tmp_path / "new_folder",
        tmp_path / "no" / "no" / "x.png",
    ):
        check_writable(good, may_be_folder=True)
    np.save(tmp_path / "x.npy", np.zeros(1))
    check_writable(tmp_path / "x.npy")


def test_a_folder_for_outputs_can_be_made_unless_something_stands_in_its_place(
    tmp_path: Path,
) -> None:
    (tmp_path / "there").mkdir()
    for good in (None, tmp_path / "there", tmp_path / "no" / "new"):
        check_folder(good)
    (tmp_path / "file").touch()
    for bad, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "folder", "is not a directory"),
    ):
        with pytest.raises(ConflictError, match=message):
            check_folder(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_folders_of_an_output_are_made_and_stay_if_it_is_written(tmp_path: Path) -> None:
    def fail() -> None:
        with written(tmp_path / "a" / "b" / "x.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    save_text("whole", tmp_path / "a" / "b" / "x.json")
    assert (tmp_path / "a" / "b" / "x.json").read_text() == "whole"


@pytest.mark.parametrize(
    "values",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.eye(3)),
        np.ones((2, 3))[::, ::2],
        np.float32(3),
    ],
)
def test_an_array_is_read_back_as_it_was(values: np.ndarray, tmp_path: Path) -> None:
    save_array(values, tmp_path / "x")
    np.testing.assert_array_equal(np.load(tmp_path / "x"), values)


def test_a_full_disk_is_named_as_such_for_large_arrays(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="the disk is full"):
            save_array(np.zeros(10**6), tmp_path / "x.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_distinct(output=tmp_path / "x.png", report=tmp_path / "x.json", latents_output=None)
    check_distinct(output=Path("/dev/null"), report=Path("/dev/null"))
    with pytest.raises(UsageError, match="--output and --latents-output name the same file"):
        check_distinct(
            output=tmp_path / "x.png", latents_output=tmp_path / "there" / ".." / "x.png"
        )
