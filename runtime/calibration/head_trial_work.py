"""The files of trials of heads, which share what their first steps have in common."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from goc_deploy.disk import save_array, save_text
from goc_deploy.runtime.calibration.head_step import StepFit
from goc_deploy.runtime.calibration.head_work import HeadWork

MEASURED = "measured.json"


class TrialWork(HeadWork):
    """The files of one trial, in a folder of many.

    What step k starts from is named by all that decides it, so a trial goes on from the last state
    that it shares with another one.

    Args:
        folder: the folder of all trials, whose lock the caller holds.
        names: T + 1 names, see `goc_deploy.runtime.calibration.head_task.HeadTask.prefixes`.
        teacher: the files of a teacher that ran before.
        places: [T] which of the teacher's latents each step aims at.
        stride: the states before every ``stride``-th step stay.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        teacher: HeadWork,
        places: Sequence[int],
        stride: int,
    ) -> None:
        super().__init__(folder)
        self._names, self._teacher, self._places = names, teacher, list(places)
        self._stride = stride

    @property
    def finished(self) -> int:
        """The number of first steps that this or another trial finished."""
        made = [step for step in range(1, len(self._names)) if self._latents(step).exists()]
        return max(made, default=0)

    def teacher(self, chunk: range, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The latents of a chunk that the steps aim at, (N, T, C, H, W)."""
        return self._teacher.teacher(chunk, make)[:, self._places]

    def finish(self, step: int, latents: np.ndarray, _: StepFit) -> None:
        """Keep what a step results in, and remove what only this step needed."""
        save_array(latents, self._latents(step + 1))
        if step % self._stride:
            self._drop(step)

    def _latents(self, step: int) -> Path:
        return self._folder / f"latents-{self._names[step]}.npy"

    def _state(self, step: int) -> Path:
        return self._folder / f"state-{self._names[step]}"


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove latents and states of trials with other names."""
    for kind in ("latents", "state"):  # in this order: a trial starts where there are latents
        for path in sorted(folder.glob(f"{kind}-*")):
            if path.stem.partition("-")[2] not in names:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def read_measured(folder: Path) -> dict[str, float]:
    """The errors of finished trials by name, infinite if the trial diverged."""
    path = folder / MEASURED
    if not path.exists():
        return {}
    read = json.loads(path.read_text(encoding="utf-8"))
    return {name: math.inf if error is None else error for name, error in read.items()}


def save_measured(measured: dict[str, float], folder: Path) -> None:
    """Write what `read_measured` reads."""
    plain = {name: error if math.isfinite(error) else None for name, error in measured.items()}
    save_text(json.dumps(plain), folder / MEASURED)
