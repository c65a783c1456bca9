"""Shards on disk: whole or not at all, bound to a job, verified by the digest of their name."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.errors import ConflictError
from goc_deploy.options import no_progress
from goc_deploy.sharded.folder import JOB_NAME, ShardFolder
from goc_deploy.sharded.job import Job, job_from_json, job_to_json

JOB = Job(10, 4, {"seed": 3, "plan": "fora-2", "device": None, "cfg_scale": 4.0})
IMAGES = np.arange(10 * 2 * 2, dtype=np.uint8).reshape(10, 2, 2, 1)


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    folder = ShardFolder(tmp_path / "shards", JOB)
    folder.begin()
    return folder


def publish_all(folder: ShardFolder) -> None:
    for shard in folder.job.shards:
        folder.publish(shard, IMAGES[shard.start : shard.stop])


def test_the_shards_of_a_job_are_its_images_in_order() -> None:
    assert JOB.shards == (range(4), range(4, 8), range(8, 10))


def test_a_job_is_read_as_it_was_written() -> None:
    assert job_from_json(job_to_json(JOB), "job.json") == JOB


@pytest.mark.parametrize("text", [b"", b"[]", b'{"format": "goc_deploy shards", "version": 1}'])
def test_a_damaged_job_is_refused(text: bytes) -> None:
    with pytest.raises(ConflictError, match=r"job\.json"):
        job_from_json(text, "job.json")


def test_shards_are_published_once_under_their_digest(folder: ShardFolder) -> None:
    assert folder.missing(no_progress) == list(JOB.shards)
    publish_all(folder)
    names = sorted(path.name for path in folder.path.iterdir())
    publish_all(folder)
    assert sorted(path.name for path in folder.path.iterdir()) == names
    assert len(names) == 1 + len(JOB.shards)
    for path in folder.path.glob("images-*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.name
    assert folder.missing(no_progress) == []
    read = np.concatenate(list(folder.read(JOB.shards)))
    np.testing.assert_array_equal(read, IMAGES)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_shard_is_found_and_made_again(
    folder: ShardFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish_all(folder)
    path = next(folder.path.glob("images-0000004-*"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(content[: {"truncate": -3, "flip": len(content), "empty": 0}[damage]])
    with pytest.raises(ConflictError, match="damaged after it was checked"):
        list(folder.read([range(4, 8)]))
    with caplog.at_level(logging.WARNING, "goc_deploy"):
        assert folder.missing(no_progress) == [range(4, 8)]
    assert "images-0000004-0000008" in caplog.text
    assert not path.exists()
    publish_all(folder)
    assert folder.missing(no_progress) == []


def test_what_a_killed_process_left_is_removed(folder: ShardFolder) -> None:
    leftover = folder.path / f".images-0000000-0000004.{'0' * 64}.tmp-77-01234567.npy"
    leftover.write_bytes(b"half")
    assert folder.missing(no_progress) == list(JOB.shards)
    folder.begin()
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(JOB, facts={**JOB.facts, "seed": 4}), "seed 3, not 4"),
        (replace(JOB, facts={**JOB.facts, "plan": "none"}), "plan fora-2, not none"),
        (replace(JOB, facts={**JOB.facts, "new": 1}), "new None, not 1"),
        (replace(JOB, images=11), "images 10, not 11"),
        (replace(JOB, shard_images=2), "shard_images 4, not 2"),
    ],
)
def test_another_job_is_refused_by_the_name_of_what_differs(
    folder: ShardFolder, other: Job, named: str
) -> None:
    publish_all(folder)
    with pytest.raises(ConflictError, match=named):
        ShardFolder(folder.path, other).begin()
    folder.begin()
    assert folder.missing(no_progress) == []


def test_a_worker_of_another_job_cannot_publish(folder: ShardFolder) -> None:
    other = ShardFolder(folder.path, replace(JOB, facts={"seed": 4}))
    with pytest.raises(ConflictError, match="not that of this job"):
        other.publish(range(4), IMAGES[:4])
    (folder.path / JOB_NAME).unlink()
    with pytest.raises(ConflictError, match="file system that all machines share"):
        folder.publish(range(4), IMAGES[:4])


def test_two_shards_of_the_same_images_with_other_bits_are_refused(folder: ShardFolder) -> None:
    folder.publish(range(4), IMAGES[:4])
    folder.publish(range(4), IMAGES[4:8])
    with pytest.raises(ConflictError, match="different bits"):
        folder.missing(no_progress)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConflictError, match=r"no job\.json"):
        ShardFolder(tmp_path, JOB).begin()


def test_a_shard_that_is_not_visible_is_named(folder: ShardFolder) -> None:
    with pytest.raises(ConflictError, match="lacks images 8 to 9"):
        list(folder.read([range(8, 10)]))
