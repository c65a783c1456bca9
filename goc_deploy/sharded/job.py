"""What determines the bytes of a series of images. Its shards are bound to this record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from goc_deploy.engine_dir.fingerprint import fingerprint
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import ConflictError, UsageError
from goc_deploy.spec import Size
from goc_deploy.strict_json import check_format, convert, dump_json, parse_json
from goc_deploy.version import __version__

if TYPE_CHECKING:
    from goc_deploy.api.series import Series
    from goc_deploy.runtime.pipeline import Pipeline

JOB_FORMAT, JOB_VERSION = "goc_deploy shards", 1
DEFAULT_SHARD_IMAGES = 64
CONDITION = ("image", "label", "prompt", "negative_prompt")  # of one image in a record
# What of a backend's description decides bits; the index of a GPU does not.
BACKEND = ("backend", "version", "provider", "device", "compute_capability")


@dataclass(frozen=True, slots=True)
class Job:
    """A series of images in shards.

    Attributes:
        images: number of images.
        shard_images: images of a shard; the last shard may have fewer.
        facts: what determines the bytes, by name, in JSON types.
    """

    images: Size
    shard_images: Size
    facts: dict[str, Any]

    @property
    def shards(self) -> tuple[range, ...]:
        """The indexes of the images of each shard."""
        starts = range(0, self.images, self.shard_images)
        return tuple(range(a, min(a + self.shard_images, self.images)) for a in starts)


def versions() -> dict[str, str]:
    """Versions of the packages of this process that compute images, by name."""
    return {
        "goc_deploy": __version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def job_of(pipe: Pipeline, series: Series, shard_images: int | None) -> Job:
    """Describe a series that a pipeline draws in shards.

    Args:
        pipe: the pipeline.
        series: the images.
        shard_images: images of a shard, or None for at least 64 in whole batches.

    Raises:
        UsageError: the images of a shard are not whole batches.
    """
    batch = pipe.batch_size
    if shard_images is None:
        shard_images = -(-DEFAULT_SHARD_IMAGES // batch) * batch
    if shard_images % batch:
        raise UsageError(
            f"a shard of {shard_images} images is not made of whole batches of {batch}, so its "
            "bits might differ from those of a run without shards; choose a multiple of "
            f"{batch}, or another `batch_size`"
        )
    records = series.records(pipe)
    shown = [{name: one[name] for name in CONDITION if name in one} for one in records]
    backend = pipe.backend_description
    facts = {
        **versions(),
        **{name: value for name, value in records[0].items() if name not in CONDITION},
        "conditions_sha256": hashlib.sha256(json.dumps(shown).encode()).hexdigest(),
        "engine_sha256": _engine_digest(pipe.manifest, pipe.plan.name),
        "plan_form": pipe.plan.form,  # each form adds in another order
        "batch_size": batch,
        **{name: backend[name] for name in BACKEND if name in backend},
        **({} if "device" in backend else _processor(series.options.threads)),
    }
    return Job(len(records), shard_images, facts)


def _processor(threads: int) -> dict[str, Any]:
    """What decides bits on a CPU: with other threads, ONNX Runtime splits its sums differently."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = match[1] if match else model
    return {"threads": threads or cores, "processor": model}


def _engine_digest(manifest: Manifest, plan: str) -> str:
    """Fingerprint of what a plan uses of an engine directory, in which other plans may appear."""
    used = {manifest.stored_captions}
    for graph in manifest.graphs:
        used |= {graph.onnx, graph.weights_file}
    for entry in manifest.plans:
        if entry.name == plan:
            used |= {entry.plan, entry.schedule, entry.head}
    return fingerprint(file for file in manifest.files if file.path in used)


def differences(expected: Job, other: Job) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each value that differs between two jobs, with both values."""
    left, right = _fields(expected), _fields(other)
    for name in sorted({*left, *right}):
        if left.get(name) != right.get(name):
            yield name, left.get(name), right.get(name)


def _fields(job: Job) -> dict[str, Any]:
    return {**job.facts, "images": job.images, "shard_images": job.shard_images}


def job_to_json(job: Job) -> bytes:
    """Write a job; equal jobs have equal bytes."""
    fields = {
        "format": JOB_FORMAT,
        "version": JOB_VERSION,
        "images": job.images,
        "shard_images": job.shard_images,
        "facts": {name: job.facts[name] for name in sorted(job.facts)},
    }
    return dump_json(fields).encode()


def job_from_json(text: bytes, where: str) -> Job:
    """Read a job.

    Raises:
        ConflictError: the text is no job, or one of a newer version.
    """
    fields = parse_json(text, where, ConflictError)
    check_format(fields, JOB_FORMAT, JOB_VERSION, where, ConflictError)
    del fields["format"], fields["version"]
    job: Job = convert(fields, Job, where, ConflictError)
    return job
