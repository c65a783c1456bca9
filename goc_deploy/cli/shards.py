"""Options of goc-run that split a large series of images into shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from goc_deploy.cli.options import PATH, composed
from goc_deploy.errors import UsageError
from goc_deploy.options import ShardOptions

if TYPE_CHECKING:
    from goc_deploy.sharded.run import ShardedResult

BESIDE = "beside the output"  # the value of --shards without a folder

shard_options = composed(
    click.option(
        "--shards",
        type=PATH,
        is_flag=False,
        flag_value=BESIDE,
        metavar="[DIR]",
        help="Draw the images in shards, which are kept in a folder, so that an interrupted run "
        "continues. The output ends in .npz. The folder is OUTPUT.shards if none is given.",
    ),
    click.option(
        "--shard-images",
        type=click.IntRange(1),
        help="Number of images per shard, a multiple of the batch size.  "
        "[default: the smallest multiple that is at least 64]",
    ),
    click.option(
        "--ray",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Let workers of a Ray cluster draw the shards: HOST:PORT or auto names a cluster, and "
        "without an address one is started on this machine. It implies --shards.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Number of workers with --ray, each with one GPU, or with --threads CPUs.  "
        "[default: as many as the cluster has room for]",
    ),
)


def take_shard_options(options: dict[str, Any]) -> ShardOptions | None:
    """Remove the options of shards from those of goc-run.

    Returns:
        The options of shards, or None for a run without shards.

    Raises:
        UsageError: an option that goes with shards only, or no output.
        ConflictError: the folder cannot be made.
    """
    from goc_deploy.cli.paths import check_folder

    folder, shard_images = options.pop("shards"), options.pop("shard_images")
    address, workers = options.pop("ray"), options.pop("workers")
    if workers is not None and address is None:
        raise UsageError("`workers` goes with `ray`, whose workers draw the images")
    if folder is None and address is None:
        if shard_images is not None:
            raise UsageError("`shard_images` goes with `folder`, which draws the images in shards")
        return None
    output = options["output"]
    if output is None:
        raise UsageError("a series in shards needs an `output`, whose name ends in .npz")
    if folder in (None, Path(BESIDE)):
        folder = output.with_name(f"{output.name}.shards")
    check_folder(folder)
    return ShardOptions(folder, shard_images, address, workers)


def summary(result: ShardedResult) -> Iterator[str]:
    """What came of a series in shards, as lines for stderr."""
    if result.drawn < result.images:
        yield f"{result.images - result.drawn} of {result.images} images were there before"
    if result.drawn:
        rate = result.drawn / result.seconds
        yield (
            f"{result.drawn} images drawn by {result.workers} "
            f"worker{'s' if result.workers > 1 else ''} on {result.backend} in "
            f"{result.seconds:.2f} s, {rate:.3g} images per second"
        )
    yield f"the shards remain in {result.folder}; remove it when they are no longer needed"
