"""A folder of shards: each is one file, published whole, with its SHA-256 in its name."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from goc_deploy.disk import disk_errors, written
from goc_deploy.errors import ConflictError
from goc_deploy.options import Progress
from goc_deploy.sharded.job import Job, differences, job_from_json, job_to_json

logger = logging.getLogger(__name__)

JOB_NAME = "job.json"
SHARD_NAME = re.compile(r"images-(\d{7,})-(\d{7,})\.([0-9a-f]{64})\.npy")
UNFINISHED = ".images-*.tmp-*"  # names of `written` that a killed process leaves


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The shards of a job on a file system that all its processes share.

    ``job.json`` has the job. ``images-FIRST-END.SHA256.npy`` has the images FIRST to END - 1, uint8
    (n, H, W, 1 or 3), and the SHA-256 of its bytes in its name, so that one rename publishes both.

    Attributes:
        path: path of the folder.
        job: the job.
    """

    path: Path
    job: Job

    def begin(self) -> None:
        """Make the folder, or continue with it. The caller must hold the lock of the folder.

        Raises:
            ConflictError: the folder belongs to another job, or has other files and no job.
        """
        path = self.path / JOB_NAME
        with disk_errors(f"opening {self.path}"):
            if path.exists():
                stored = job_from_json(path.read_bytes(), str(path))
                for name, here, there in differences(self.job, stored):
                    raise ConflictError(
                        f"{self.path} has shards that were made with {name} {there}, not {here}; "
                        "choose another folder or the same options, or remove the folder"
                    )
                for leftover in self.path.glob(UNFINISHED):
                    leftover.unlink(missing_ok=True)
                return
            if self.path.exists() and any(self.path.iterdir()):
                raise ConflictError(
                    f"{self.path} has files but no {JOB_NAME}; choose another folder for shards"
                )
        with written(path) as temporary:
            temporary.write_bytes(job_to_json(self.job))

    def missing(self, progress: Progress) -> list[range]:
        """Verify every shard, and remove those that are damaged, with a warning.

        Args:
            progress: called with (what, done, total).

        Returns:
            The shards that are not there.

        Raises:
            ConflictError: two shards of the same images have different bytes.
        """
        there, wanted = self._files(), []
        for done, shard in enumerate(self.job.shards):
            progress("checking shards", done, len(self.job.shards))
            if shard not in there:
                wanted.append(shard)
                continue
            with disk_errors(f"reading {there[shard]}"):
                if not _is_whole(there[shard], there[shard].read_bytes()):
                    logger.warning(
                        "%s is damaged: its bytes do not have the SHA-256 of its name. Its images "
                        "are drawn again",
                        there[shard],
                    )
                    there[shard].unlink()
                    wanted.append(shard)
        return wanted

    def publish(self, shard: range, images: np.ndarray) -> None:
        """Write a shard, whole or not at all; writing it twice changes nothing.

        Args:
            shard: indexes of the images.
            images: (n, H, W, 1 or 3) uint8.

        Raises:
            ConflictError: the folder does not belong to the job, or cannot be written.
            ResourceError: the disk is full.
        """
        job = self.path / JOB_NAME
        if not job.exists() or job.read_bytes() != job_to_json(self.job):
            raise ConflictError(
                f"{job} is not that of this job; do not change the folder of shards meanwhile, and "
                "have it on a file system that all machines share"
            )
        content = _npy_bytes(images)
        digest = hashlib.sha256(content).hexdigest()
        name = f"images-{shard.start:07d}-{shard.stop:07d}.{digest}.npy"
        with written(self.path / name) as temporary:
            temporary.write_bytes(content)

    def read(self, shards: Iterable[range]) -> Iterator[np.ndarray]:
        """Read and verify shards; yields the images of each, uint8 (n, H, W, 1 or 3).

        Raises:
            ConflictError: a shard is missing or damaged.
        """
        there = self._files()
        for shard in shards:
            path = there.get(shard)
            if path is None:
                raise ConflictError(
                    f"{self.path} lacks images {shard.start} to {shard.stop - 1}, although a "
                    "worker has published them; it must be on a file system that all machines "
                    "share"
                )
            with disk_errors(f"reading {path}"):
                content = path.read_bytes()
            if not _is_whole(path, content):
                raise ConflictError(
                    f"{path} was damaged after it was checked; run again, and its images are drawn "
                    "again"
                )
            yield np.load(io.BytesIO(content), allow_pickle=False)

    def _files(self) -> dict[range, Path]:
        """The files of the shards of this job by their images.

        Raises:
            ConflictError: two shards of the same images have different bytes.
        """
        files: dict[range, Path] = {}
        wanted = set(self.job.shards)
        with disk_errors(f"reading {self.path}"):
            paths = sorted(self.path.iterdir())
        for path in paths:
            name = SHARD_NAME.fullmatch(path.name)
            shard = range(int(name[1]), int(name[2])) if name else range(0)
            if shard not in wanted:
                continue
            if shard in files:
                raise ConflictError(
                    f"two workers drew images {shard.start} to {shard.stop - 1} with different "
                    f"bits: {files[shard]} and {path.name}; use machines of one kind, and remove "
                    "both files"
                )
            files[shard] = path
        return files


def _npy_bytes(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(images), version=(1, 0))
    return file.getvalue()


def _is_whole(path: Path, content: bytes) -> bool:
    name = SHARD_NAME.fullmatch(path.name)
    return name is not None and hashlib.sha256(content).hexdigest() == name[3]
