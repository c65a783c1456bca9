"""The work folder of a fit: what is finished, in files, so that a killed fit goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.disk import disk_errors, save_array, save_text, written
from goc_deploy.errors import ResourceError
from goc_deploy.runtime.calibration.head_step import StepFit
from goc_deploy.version import __version__


def work_folder(*decides: object) -> Path:
    """The folder of a fit in the user's cache.

    Args:
        decides: everything that decides the result, with a ``repr`` that is the same in every
            process.
    """
    digest = sha256(repr((__version__, *decides)).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return root / "goc_deploy" / "heads" / digest[:32]


class HeadWork:
    """The files of a fit. Every file appears whole or not at all.

    After step k there are the latents and the state of every chunk, from which step k + 1 starts,
    and the fits of all steps so far. The file of the latents appears last, so a step whose latents
    exist is finished.

    Args:
        folder: the work folder, whose lock the caller holds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with disk_errors(f"making {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def finished(self) -> int:
        """The number of finished steps."""
        done = [int(path.stem.rpartition("-")[2]) for path in self._folder.glob("latents-*.npy")]
        return max(done, default=0)

    def teacher(self, chunk: range, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The latents that the teacher made of a chunk, a file in memory; ``make`` if missing."""
        path = self._folder / f"teacher-{chunk.start}.npy"
        if not path.exists():
            save_array(make(), path)
        return np.asarray(np.load(path, mmap_mode="r"))

    def scratch(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array in a file, whose contents are undefined."""
        path = self._folder / f"{name}.scratch"
        needed = 4 * int(np.prod(shape))
        with disk_errors(f"writing {path}"):
            if not path.exists() and needed > shutil.disk_usage(self._folder).free:
                raise ResourceError(
                    f"{self._folder} needs {needed / 1e9:.2f} GB for {name}; free some space, "
                    "set XDG_CACHE_HOME to another disk, or use fewer images"
                )
            return np.memmap(path, np.float32, "w+", shape=shape)

    def save_state(self, step: int, chunk: range, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state of a chunk before a step."""
        folder = self._state(step)
        with written(folder / f"{chunk.start}.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]  # names are no arguments of NumPy's

    def state(self, step: int, chunk: range) -> dict[str, np.ndarray]:
        """The state of a chunk before a step."""
        with np.load(self._state(step) / f"{chunk.start}.npz") as arrays:
            return dict(arrays)

    def latents(self, step: int) -> np.ndarray:
        """The latents of all images before a step, (N, C, H, W), a file in memory."""
        return np.asarray(np.load(self._latents(step), mmap_mode="r"))

    def finish(self, step: int, latents: np.ndarray, fit: StepFit) -> None:
        """Keep what a step results in, and remove what only this step needed."""
        record = {k: v for k, v in asdict(fit).items() if k != "weights"}
        save_array(fit.weights, self._folder / f"weights-{step}.npy")
        save_text(json.dumps(record), self._folder / f"fit-{step}.json")
        save_array(latents, self._latents(step + 1))
        self._drop(step)

    def fits(self) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """The weights and the record of every finished step."""
        folder = self._folder
        return [
            (
                np.load(folder / f"weights-{step}.npy"),
                json.loads((folder / f"fit-{step}.json").read_text(encoding="utf-8")),
            )
            for step in range(self.finished)
        ]

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _drop(self, step: int) -> None:
        """Remove what a step starts from: first the latents, without which nothing starts there."""
        self._latents(step).unlink(missing_ok=True)
        shutil.rmtree(self._state(step), ignore_errors=True)

    def _latents(self, step: int) -> Path:
        return self._folder / f"latents-{step}.npy"

    def _state(self, step: int) -> Path:
        return self._folder / f"state-{step}"
