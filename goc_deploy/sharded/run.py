"""A series of images in shards to one file: the work behind ``goc-run --shards`` and ``--ray``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from goc_deploy.disk import directory_lock
from goc_deploy.errors import UsageError
from goc_deploy.options import Progress, RunOptions, ShardOptions, no_progress
from goc_deploy.runtime.picture_files import PictureFiles
from goc_deploy.sharded.folder import ShardFolder
from goc_deploy.sharded.ray_pool import RayPool, ray_pool
from goc_deploy.sharded.worker import ShardWorker


@dataclass(frozen=True, slots=True)
class ShardedResult:
    """What `run_sharded` did.

    Attributes:
        output: the file of all images.
        folder: the folder of the shards, which remains.
        images: number of images of the series.
        drawn: number of these that were drawn now; the others were there before.
        workers: number of workers that drew them.
        backend: name and provider of the backend.
        seconds: the time that drawing took.
    """

    output: Path
    folder: Path
    images: int
    drawn: int
    workers: int
    backend: str
    seconds: float


def run_sharded(
    engine_dir: str | Path,
    options: RunOptions,
    shards: ShardOptions,
    progress: Progress = no_progress,
) -> ShardedResult:
    """Draw a series of images shard by shard, and assemble them in an ``.npz`` file.

    The file has the bytes that `goc_deploy.api.run.run` writes. Shards that an earlier run of the
    same job has published are verified and kept.

    Args:
        engine_dir: the directory that `goc_deploy.export` wrote.
        options: what to draw, on which backend, and the output.
        shards: how the series is split, where the shards are, and who draws them.
        progress: called with (what, done, total).

    Raises:
        ConflictError: the folder has shards of another job, or another process writes the output.
        GocError: as `goc_deploy.api.run.run`.
    """
    output = check_sharded(options)
    options = _with_absolute_paths(options)
    shards = replace(shards, folder=shards.folder.absolute())
    with (
        directory_lock(output, seconds=0),
        directory_lock(shards.folder, seconds=0),
        _crew(Path(engine_dir).absolute(), options, shards, progress) as crew,
    ):
        folder = ShardFolder(shards.folder, crew.job)
        folder.begin()
        missing = folder.missing(progress)
        started = time.perf_counter()
        workers = crew.draw(missing, progress)
        seconds = time.perf_counter() - started
        _assemble(folder, crew.labels, output, progress)
        drawn = sum(map(len, missing))
        images, backend = crew.job.images, crew.backend
        return ShardedResult(output, shards.folder, images, drawn, workers, backend, seconds)


def check_sharded(options: RunOptions) -> Path:
    """Refuse options that do not go with shards.

    Returns:
        The output.

    Raises:
        UsageError: the output is no ``.npz`` file, or another output is asked for.
    """
    if options.output is None or options.output.suffix.lower() != ".npz":
        raise UsageError("a series in shards is one file; choose an `output` that ends in .npz")
    if options.resume or options.latents_output or options.trajectory_output or options.report:
        raise UsageError(
            "shards hold images and always continue; leave out `resume`, `latents_output`, "
            "`trajectory_output` and `report`"
        )
    return options.output


def _with_absolute_paths(options: RunOptions) -> RunOptions:
    """Workers may have another working directory."""
    return replace(
        options,
        latents=options.latents and options.latents.absolute(),
        prompt_embeds=options.prompt_embeds and options.prompt_embeds.absolute(),
        reference_latents=options.reference_latents and options.reference_latents.absolute(),
    )


def _crew(
    engine_dir: Path, options: RunOptions, shards: ShardOptions, progress: Progress
) -> AbstractContextManager[ShardWorker | RayPool]:
    if shards.ray is None:
        return ShardWorker(engine_dir, options, shards)
    return ray_pool(engine_dir, options, shards, progress)


def _assemble(folder: ShardFolder, labels: Sequence[int], output: Path, progress: Progress) -> None:
    """Write the output from all shards, verifying each; it appears whole or not at all."""
    shards = folder.job.shards
    with PictureFiles(output, labels, ()) as pictures:
        for done, (shard, images) in enumerate(zip(shards, folder.read(shards), strict=True)):
            progress("assembling shards", done, len(shards))
            pictures.add(shard.start, images)
