"""Workers of a Ray cluster that draw shards. One that dies is started again, its shard redrawn."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError, GocError, UsageError
from goc_deploy.options import Progress, RunOptions, ShardOptions
from goc_deploy.sharded.job import Job, differences, versions
from goc_deploy.sharded.ray_cluster import connected, number_of_workers
from goc_deploy.sharded.worker import ShardWorker

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
MOST_DEATHS = 3  # of workers while they draw one shard
MOST_RESTARTS = 20  # of one worker
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")

Call = tuple[Any, range | None]  # an actor, and the shard that it draws, or None while it loads
Started = tuple[Job, Sequence[int], str, dict[str, str], str]


class Actor:
    """A worker on a device of its own; Ray makes one in a process per actor."""

    def __init__(self, engine_dir: Path, options: RunOptions, shards: ShardOptions) -> None:
        self._arguments = (engine_dir, options, shards)
        self._worker: ShardWorker | None = None

    def start(self) -> Started:
        """Load the engine directory; job, labels, backend, versions and name of the machine."""
        if self._worker is None:
            self._worker = ShardWorker(*self._arguments)
        one = self._worker
        return one.job, one.labels, one.backend, versions(), platform.node()

    def draw(self, shard: range) -> None:
        """Draw and publish a shard."""
        assert self._worker is not None, "a shard comes after the start"
        self._worker.draw_shard(shard)


class RayPool:
    """A pool of actors; see `goc_deploy.sharded.worker.ShardWorker`. Made by `ray_pool`."""

    def __init__(self, ray: Any, actors: Sequence[Any], progress: Progress) -> None:
        self._ray, self._actors = ray, actors
        self._calls: dict[Any, Call] = {}
        for actor in actors:
            self._start(actor)
        self._idle: list[Any] = []
        self._first: Started | None = None
        while self._first is None:
            progress("loading workers", 0, len(actors))
            self._step(deque(), Counter())
        self.job: Job = self._first[0]
        self.labels: Sequence[int] = self._first[1]
        self.backend: str = self._first[2]

    def draw(self, missing: Sequence[range], progress: Progress) -> int:
        """See `goc_deploy.sharded.worker.ShardWorker.draw`; progress is reported in images.

        Raises:
            EnvironmentUnsupportedError: a worker computes other bits, or its process died too
                often.
        """
        waiting, deaths = deque(missing), Counter[range]()
        done, total = 0, sum(map(len, missing))
        while done < total:
            progress("images", done, total)
            while waiting and self._idle:
                actor, shard = self._idle.pop(), waiting.popleft()
                self._calls[actor.draw.remote(shard)] = (actor, shard)
            done += self._step(waiting, deaths)
        progress("images", total, total)
        return len(self._actors)

    def _start(self, actor: Any) -> None:
        # A call to a process that is restarted is retried until it is there; MOST_RESTARTS ends it.
        self._calls[actor.start.options(max_task_retries=-1).remote()] = (actor, None)

    def _step(self, waiting: deque[range], deaths: Counter[range]) -> int:
        """Wait for calls to end, for a moment; the number of images that became complete."""
        ray, done = self._ray, 0
        ready, _ = ray.wait(list(self._calls), timeout=POLL_SECONDS)
        for call in ready:
            actor, shard = self._calls.pop(call)
            try:
                value = ray.get(call)
            except ray.exceptions.RayActorError as cause:
                self._died(actor, shard, cause, waiting, deaths)
                continue
            except ray.exceptions.RayTaskError as cause:
                if isinstance(cause.cause, GocError):
                    raise cause.cause from None
                raise
            if shard is None:
                self._check(value)
            else:
                done += len(shard)
            self._idle.append(actor)
        return done

    def _died(
        self,
        actor: Any,
        shard: range | None,
        cause: Exception,
        waiting: deque[range],
        deaths: Counter[range],
    ) -> None:
        """Put a shard back and load the worker again; give up if it happens too often."""
        if shard is None or deaths[shard] == MOST_DEATHS:
            what = "loads" if shard is None else f"draws images {shard.start} to {shard.stop - 1}"
            raise EnvironmentUnsupportedError(
                f"the process of a worker dies whenever it {what}: {cause}; the logs of Ray have "
                "more. Shards that were published are kept"
            ) from cause
        deaths[shard] += 1
        waiting.appendleft(shard)
        logger.warning(
            "a worker died while it drew images %d to %d; they are drawn again",
            shard.start,
            shard.stop - 1,
        )
        self._start(actor)

    def _check(self, started: Started) -> None:
        """Refuse a worker whose images would have other bits, also one that was restarted."""
        job, _, _, worker_versions, node = started
        for package, version in versions().items():
            if worker_versions.get(package) != version:
                raise EnvironmentUnsupportedError(
                    f"the worker on {node} has {package} {worker_versions.get(package)}, and this "
                    f"process has {version}; install the same versions on all machines"
                )
        if self._first is None:
            self._first = started
        for name, first, other in differences(self._first[0], job):
            raise EnvironmentUnsupportedError(
                f"the worker on {node} has {name} {other}, and the first one has {first}; use "
                "machines of one kind with the same engine directory"
            )


@contextlib.contextmanager
def ray_pool(
    engine_dir: Path, options: RunOptions, shards: ShardOptions, progress: Progress
) -> Iterator[RayPool]:
    """Start one worker per GPU, or per ``threads`` CPUs.

    Raises:
        EnvironmentUnsupportedError: there is no Ray or no room, or a worker cannot be used.
        UsageError: a GPU is chosen by its index, which Ray does.
        GocError: as `goc_deploy.sharded.worker.ShardWorker`.
    """
    if options.device.startswith("cuda:"):
        raise UsageError("Ray gives each worker a GPU; use `device=cuda`")
    assert shards.ray is not None
    with connected(shards.ray) as ray:
        options, needs = _needs(options, ray.cluster_resources())
        count = number_of_workers(ray, needs, shards.workers)
        made = ray.remote(Actor).options(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=MOST_RESTARTS
        )
        actors = [made.remote(engine_dir, options, shards) for _ in range(count)]
        try:
            yield RayPool(ray, actors, progress)
        finally:
            for actor in actors:
                ray.kill(actor)


def _needs(options: RunOptions, cluster: dict[str, float]) -> tuple[RunOptions, dict[str, float]]:
    """What a worker needs, and its options."""
    gpu = options.device == "cuda" or options.backend in GPU_BACKENDS
    if options.device == options.backend == "auto":
        gpu = cluster.get("GPU", 0) > 0
    if gpu:
        return options, {"CPU": 1, "GPU": 1}
    options = replace(options, threads=options.threads or 1)
    return options, {"CPU": options.threads}
