"""Writing the images of a series to files, and continuing an interrupted series."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from goc_deploy.conditions.labels import grid_columns
from goc_deploy.disk import written
from goc_deploy.errors import ConflictError
from goc_deploy.runtime.adm import AdmWriter, adm_writer
from goc_deploy.runtime.images import grid, picture

RECORD = "goc_deploy"  # name of the PNG text with the record of an image


class PictureFiles:
    """The files of one output, a context manager.

    ``.png`` is a grid, and ``.npz`` is the ADM format: ``arr_0`` has the images, uint8 (N, H, W,
    3), and ``arr_1`` their labels. Both are published complete if the body of the ``with``
    succeeds. Any other name is a directory, in which each image is published when it is added.

    Args:
        output: path of the file or directory.
        labels: labels of the whole series.
        records: for each image of the series, the values that it was made from, in JSON types.
    """

    def __init__(
        self, output: Path, labels: Sequence[int], records: Sequence[Mapping[str, Any]]
    ) -> None:
        self._output, self._labels, self._records = output, labels, records
        self._stack = ExitStack()
        self._adm: AdmWriter | None = None
        self._kept: list[np.ndarray] = []

    def __enter__(self) -> PictureFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        if kind is None and self._kept:
            images = np.concatenate(self._kept)
            scale = max(1, 112 // images.shape[1])
            with written(self._output) as temporary:
                grid(images, grid_columns(self._labels), scale=scale, gap=2 * scale).save(temporary)
        self._stack.__exit__(kind, *raised)

    def add(self, first: int, images: np.ndarray) -> None:
        """Add the next images.

        Args:
            first: index of the first of them in the series.
            images: (n, H, W, 1 or 3) uint8.

        Raises:
            ConflictError, ResourceError: the system refuses to write.
        """
        suffix = self._output.suffix.lower()
        if suffix == ".png":
            self._kept.append(images)
        elif suffix == ".npz":
            if self._adm is None:
                self._adm = self._stack.enter_context(
                    adm_writer(self._output, len(self._labels), *images.shape[1:3])
                )
            self._adm.add(images, tuple(self._labels[first : first + len(images)]))
        else:
            for i, image in enumerate(images, first):
                text = PngInfo()
                text.add_text(RECORD, _text(self._records[i]))
                with written(picture_path(self._output, i, len(self._labels))) as temporary:
                    picture(image).save(temporary, pnginfo=text)


def picture_path(folder: Path, index: int, total: int) -> Path:
    """The path of an image of a series of ``total`` images."""
    return folder / f"{index:0{max(4, len(str(total - 1)))}d}.png"


def finished_pictures(folder: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """The number of images of a series in a folder, from the first one up to the first gap.

    Raises:
        ConflictError: a file is not an image, or its record differs.
    """
    for i, record in enumerate(records):
        path = picture_path(folder, i, len(records))
        if not path.exists():
            return i
        try:
            with Image.open(path) as image:
                text = image.info.get(RECORD)
        # Pillow raises all of these for damaged files.
        except (OSError, ValueError, Image.DecompressionBombError) as cause:
            raise ConflictError(
                f"{path} cannot be read ({cause}); remove it, and run again with `resume=True`"
            ) from cause
        if text != _text(record):
            raise ConflictError(
                f"{path} {_difference(text, record)}; choose another directory, or the same options"
            )
    return len(records)


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _difference(text: object, record: Mapping[str, Any]) -> str:
    try:
        stored = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        return "does not tell what it was made from"
    name = next(name for name in sorted({*record, *stored}) if stored.get(name) != record.get(name))
    return f"was made with {name} {stored.get(name)}, not {record.get(name)}"
