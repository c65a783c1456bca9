"""Images of several plans from the same noise and labels, in batches: generated or read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy.conditions.captions import NO_CAPTIONS
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.errors import UsageError
from goc_deploy.options import EvalOptions, Progress
from goc_deploy.runtime.adm import AdmFile, adm_writer, open_adm

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline

LABEL_PLANS = ("balanced", "iid")


@dataclass(frozen=True, slots=True)
class Sampled:
    """One plan's images of one batch.

    Attributes:
        latents: (n, C, H, W) float32, or None if the images were read from files.
        images: (n, H, W, 1 or 3) uint8, or None if the latents need a decoder.
        trajectory: (T, m, C, H, W) of the first m images, or None.
        report: the report of `Pipeline.generate` for the batch, empty if images were read.
    """

    latents: np.ndarray | None
    images: np.ndarray | None
    trajectory: np.ndarray | None
    report: dict[str, Any]


def class_labels(kind: str, images: int, classes: int, seed: int) -> np.ndarray:
    """Choose (images,) labels.

    Args:
        kind: ``balanced`` has every class equally often (to within one), in a random order, so that
            the first few are balanced too; ``iid`` draws each label independently, as DiT's script
            does.
        images: number of images.
        classes: number of classes; labels are 0 .. classes - 1.
        seed: seed of the order or the draws.
    """
    if not classes:
        raise UsageError(NO_CAPTIONS)
    if kind == "iid":
        return np.random.default_rng([seed, classes]).integers(0, classes, images)
    if kind == "balanced":
        return np.array(balanced_labels(classes, images, seed))
    raise UsageError(f"labels {kind!r} is not one of {', '.join(LABEL_PLANS)}")


def generated(
    pipes: Mapping[str, Pipeline], labels: np.ndarray, options: EvalOptions, progress: Progress
) -> Iterator[tuple[int, dict[str, Sampled]]]:
    """Yield (index of the first image, row -> its images) batch by batch, every plan in turn.

    Args:
        pipes: row of the tables -> its plan.
        labels: (images,) labels.
        options: seed, guidance and trajectories.
        progress: called with (what, done, total).
    """
    batch = next(iter(pipes.values())).batch_size
    for first in range(0, len(labels), batch):
        part = labels[first : first + batch].tolist()
        sampled = {}
        for i, (name, pipe) in enumerate(pipes.items()):
            progress(name, first * len(pipes) + i * len(part), len(labels) * len(pipes))
            result = pipe.generate(
                part,
                seed=options.seed,
                first_image=first,
                cfg_scale=options.cfg_scale,
                cfg_channels=options.cfg_channels,
                trajectory=first < options.trajectory_images,
            )
            followed = result.trajectory
            if followed is not None:
                followed = followed[:, : options.trajectory_images - first]
            sampled[name] = Sampled(result.latents, result.images, followed, result.report)
        yield first, sampled


def read_back(
    files: Mapping[str, AdmFile], batch: int, progress: Progress
) -> Iterator[tuple[int, dict[str, Sampled]]]:
    """Yield the same as `generated`, from ADM files with equal numbers of images."""
    count = next(iter(files.values())).shape[0]  # type: ignore[index]
    readers = {name: file.batches(batch) for name, file in files.items()}
    for first in range(0, count, batch):
        progress("reading samples", first, count)
        yield (
            first,
            {name: Sampled(None, next(reader), None, {}) for name, reader in readers.items()},
        )


def samples_of_plans(folder: Path, names: Sequence[str]) -> dict[str, AdmFile]:
    """Open the ADM files of plans in a folder that ``--samples-output`` wrote.

    Raises:
        UsageError: a plan has no file, or the files do not fit together.
    """
    files = {}
    for name in names:
        path = folder / f"{name}.npz"
        if not path.is_file():
            raise UsageError(
                f"there is no {path} for plan {name}; write samples with "
                "`samples_output`, or leave it out"
            )
        files[name] = open_adm(path)
    first = files[names[0]]
    for name, file in files.items():
        if file.shape is None or file.labels is None:
            raise UsageError(
                f"{file.path} lacks arr_0 or arr_1, its images or labels; write it "
                "with `samples_output`"
            )
        same_labels = np.array_equal(file.labels, first.labels)  # type: ignore[arg-type]
        if file.shape != first.shape or not same_labels:
            raise UsageError(
                f"the samples of {name} have other labels or sizes than those of {names[0]}"
            )
    return files


class SampleWriters:
    """One ADM file per plan; all of them appear if the body of a ``with`` does not raise."""

    def __init__(
        self, folder: Path | None, names: Sequence[str], shape: tuple[int, int, int]
    ) -> None:
        """``shape`` is (images, height, width)."""
        self._stack = ExitStack()
        self._folder, self._names, self._shape = folder, names, shape
        self._writers: dict[str, Any] = {}

    def __enter__(self) -> SampleWriters:
        if self._folder is not None:
            for name in self._names:
                writer = adm_writer(self._folder / f"{name}.npz", *self._shape)
                self._writers[name] = self._stack.enter_context(writer)
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        return self._stack.__exit__(*raised)

    def add(self, sampled: Mapping[str, Sampled], labels: np.ndarray) -> None:
        """Append a batch to every file."""
        for name, writer in self._writers.items():
            images = sampled[name].images
            assert images is not None
            writer.add(images, tuple(labels.tolist()))
