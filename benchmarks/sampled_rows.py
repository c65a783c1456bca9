"""Many samples of one plan after another, in chunks that survive an interruption."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.disk import save_text, written
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ConflictError
from goc_deploy.evaluation.sampling import class_labels
from goc_deploy.runtime.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Request:
    """What decides the latents of a row; a folder holds those of one request.

    Attributes:
        plan: name in the engine directory.
        images: how many.
        seed: of noise and labels.
        cfg_scale: guidance.
        classes: of the model.
        chunk_images: images per file.
        engine: digest of the engine's graphs and weights and of the plan.
    """

    plan: str
    images: int
    seed: int
    cfg_scale: float
    classes: int
    chunk_images: int
    engine: str

    @property
    def labels(self) -> np.ndarray:
        """(images,) in random order, every class equally often."""
        return class_labels("balanced", self.images, self.classes, self.seed)

    @property
    def chunks(self) -> range:
        """First image of every chunk."""
        return range(0, self.images, self.chunk_images)


@dataclass(frozen=True, slots=True)
class Workers:
    """How to split the machine: processes with threads of their own, and images per run."""

    processes: int
    threads: int
    batch_size: int


def engine_digest(engine: EngineDir, plan: str) -> str:
    """Digest of the inputs that decide a plan's numbers: graphs, weights, the plan, its head."""
    entry, units = engine.plan_entry(plan), engine.manifest.graphs
    weights = {unit.weights_file for unit in units if unit.weights_file}
    decides = {entry.plan, entry.schedule, *(unit.onnx for unit in units), *weights}
    decides |= {entry.head} if entry.head else set()
    digests = [f"{path} {engine.sha256(path)}" for path in sorted(decides)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def sample(
    folder: Path, request: Request, engine: Path, workers: Workers, report: Callable[[str], None]
) -> None:
    """Make the chunks of a request that are not there yet.

    Raises:
        ConflictError: the folder holds chunks of another request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, request)
    missing = [first for first in request.chunks if not _chunk(folder, first).exists()]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    start = (str(engine), request, workers)
    with ProcessPoolExecutor(workers.processes, context, initializer=_load, initargs=start) as pool:
        try:
            pending = [pool.submit(_sample_chunk, str(folder), first) for first in missing]
            for done, future in enumerate(as_completed(pending), 1):
                future.result()
                report(
                    f"{request.plan}: {len(request.chunks) - len(missing) + done} of "
                    f"{len(request.chunks)} chunks"
                )
        except BaseException:
            pool.shutdown(
                wait=True, cancel_futures=True
            )  # what runs ends its chunk; the rest is for next time
            raise


def chunks_of(folder: Path, request: Request) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first image, latents (n, C, H, W) float32) of a sampled request, in order."""
    for first in request.chunks:
        with np.load(_chunk(folder, first)) as found:
            yield first, found["latents"]


def _chunk(folder: Path, first: int) -> Path:
    return folder / f"latents-{first:06d}.npz"


def _claim(folder: Path, request: Request) -> None:
    path, wanted = folder / "request.json", asdict(request)
    if not path.exists():
        save_text(json.dumps(wanted, indent=1) + "\n", path)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key in wanted if found.get(key) != wanted[key])
    if different:
        raise ConflictError(
            f"{folder} holds samples that differ in {', '.join(different)}; delete it or choose "
            "another --work"
        )


_pipe: Pipeline | None = None
_request: Request | None = None


def _load(engine: str, request: Request, workers: Workers) -> None:
    global _pipe, _request
    import goc_deploy

    _request = request
    _pipe = goc_deploy.load(
        engine, plan=request.plan, batch_size=workers.batch_size, threads=workers.threads
    )
    _pipe.warmup()


def _sample_chunk(folder: str, first: int) -> None:
    assert _pipe is not None
    assert _request is not None
    labels = _request.labels[first : first + _request.chunk_images].tolist()
    result: Any = _pipe.generate(
        labels, seed=_request.seed, first_image=first, cfg_scale=_request.cfg_scale
    )
    with written(_chunk(Path(folder), first)) as temporary:
        np.savez(temporary, latents=result.latents)
