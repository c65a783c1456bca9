"""Drawing shards on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy.api.run import opened
from goc_deploy.api.series import step_callback
from goc_deploy.errors import UsageError
from goc_deploy.options import Progress, RunOptions, ShardOptions
from goc_deploy.sharded.folder import ShardFolder
from goc_deploy.sharded.job import job_of

if TYPE_CHECKING:
    from goc_deploy.runtime.step_events import StepEvent

StepHook = Callable[["StepEvent"], None]


class ShardWorker:
    """A loaded engine directory that draws shards of a series; a context manager.

    Args:
        engine_dir: the engine directory.
        options: what to draw, and on which backend.
        shards: how the series is split, and the folder of the shards.

    Attributes:
        job: the series in shards.
        labels: the label of every image of the series.
        backend: name and provider of the backend, for people.

    Raises:
        GocError: as `goc_deploy.api.run.run`, or the model makes latents only, or videos.
    """

    def __init__(self, engine_dir: Path, options: RunOptions, shards: ShardOptions) -> None:
        self._stack = ExitStack()
        try:
            self._pipe, self._series = self._stack.enter_context(opened(engine_dir, options))
            if self._pipe.manifest.image_size is None:
                raise UsageError("shards hold images, but the model makes latents; export with vae")
            if self._pipe.spec.video:
                raise UsageError(
                    "shards hold images, but the model draws videos; draw them without shards"
                )
            self.job = job_of(self._pipe, self._series, shards.shard_images)
        except BaseException:
            self._stack.close()
            raise
        self.labels: Sequence[int] = self._series.labels
        about = self._pipe.backend_description
        self.backend = f"{about['backend']} ({about['provider']})"
        self._folder = ShardFolder(shards.folder, self.job)

    def __enter__(self) -> ShardWorker:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def draw(self, missing: Sequence[range], progress: Progress) -> int:
        """Draw and publish shards one after the other.

        Args:
            missing: the shards.
            progress: called with (what, done, total).

        Returns:
            The number of workers, 1.

        Raises:
            GocError: as `goc_deploy.runtime.pipeline.Pipeline.generate`, or a shard cannot be
                written.
        """
        steps = self._pipe.plan.steps
        done, total = 0, sum(map(len, missing)) * steps
        for shard in missing:
            before = done - shard.start * steps

            def hook(first: int, before: int = before) -> StepHook:
                return step_callback(progress, first, before + first * steps, total)

            self.draw_shard(shard, hook)
            done += len(shard) * steps
        return 1

    def draw_shard(self, shard: range, hook: Callable[[int], StepHook] | None = None) -> None:
        """Draw and publish one shard.

        Args:
            shard: indexes of its images, which are whole batches.
            hook: makes the callback of the batch that starts with an image, or None.

        Raises:
            GocError: as `draw`.
        """
        images = []
        for first in range(shard.start, shard.stop, self._pipe.batch_size):
            callback = None if hook is None else hook(first)
            drawn = self._series.batch(self._pipe, first, callback).images
            assert drawn is not None, "the manifest has the side of an image"
            images.append(drawn)
        self._folder.publish(shard, np.concatenate(images))
