"""The evaluation files of ADM: ``.npz`` with ``arr_0`` uint8 (N, H, W, C), streamed in batches.

Source: the reference batches and evaluator of "Diffusion Models Beat GANs on Image Synthesis"
(guided-diffusion).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from goc_deploy.disk import written
from goc_deploy.errors import UsageError
from goc_deploy.metrics.frechet import Gaussian

IMAGES, LABELS = "arr_0", "arr_1"
GREY, COLOUR = 1, 3
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


class AdmWriter:
    """Appends images to ``arr_0`` of a file with a fixed number of images. Made by `adm_writer`."""

    def __init__(self, member: IO[bytes], shape: tuple[int, int, int, int]) -> None:
        self._member, self._shape = member, shape
        self.labels: list[int] = []
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)

    def add(self, images: np.ndarray, labels: tuple[int, ...]) -> None:
        """Append (n, H, W, 1 or C) uint8 images; gray images are repeated over the channels."""
        self._member.write(
            np.ascontiguousarray(np.broadcast_to(images, (len(images), *self._shape[1:]))).tobytes()
        )
        self.labels += labels


@contextmanager
def adm_writer(path: Path, images: int, height: int, width: int) -> Iterator[AdmWriter]:
    """Open a writer of ``images`` RGB images; the file is published complete or not at all.

    ``arr_1`` has the labels, as in files of ADM's sampler. The file is not compressed, because
    ADM's reader streams it.
    """
    with (
        written(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
            writer = AdmWriter(member, (images, height, width, COLOUR))
            yield writer
        assert len(writer.labels) == images, (len(writer.labels), images)
        with archive.open(f"{LABELS}.npy", "w") as member:
            np.lib.format.write_array(member, np.array(writer.labels, np.int64))


@dataclass(frozen=True, slots=True)
class AdmFile:
    """A file of images, not yet read.

    Attributes:
        path: path of the file.
        shape: shape (N, H, W, C) of ``arr_0``, or None if the file has statistics only.
        labels: (N,) labels of ``arr_1``, or None.
        statistics: ``mu`` and ``sigma`` of the pooled features, or None.
        spatial_statistics: ``mu_s`` and ``sigma_s`` of the spatial features, or None.
    """

    path: Path
    shape: tuple[int, int, int, int] | None
    labels: np.ndarray | None
    statistics: Gaussian | None
    spatial_statistics: Gaussian | None

    def batches(self, images: int) -> Iterator[np.ndarray]:
        """Read batches (n, H, W, C) uint8 of at most ``images`` images, in the order of the file.

        Raises:
            UsageError: the file ends early or is damaged.
        """
        assert self.shape is not None
        count, *size = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
                _header(member)
                for first in range(0, count, images):
                    shape = (min(images, count - first), *size)
                    content = member.read(int(np.prod(shape)))
                    yield np.frombuffer(content, np.uint8).reshape(shape)
        except _BROKEN as cause:
            raise UsageError(f"{self.path} cannot be read: {cause}; make it again") from cause


def open_adm(path: Path) -> AdmFile:
    """Open an ADM file without reading its images.

    Raises:
        UsageError: the file is not an .npz file, or it has neither uint8 images (N, H, W, 1 or 3)
            nor statistics.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            shape = None
            if IMAGES in names:
                with archive.open(f"{IMAGES}.npy") as member:
                    shape = _checked_shape(path, *_header(member))
            labels = _small_array(archive, LABELS) if LABELS in names else None
            pooled, spatial = (
                Gaussian(*(_small_array(archive, key).astype(np.float64) for key in keys))
                if names >= {*keys}
                else None
                for keys in (("mu", "sigma"), ("mu_s", "sigma_s"))
            )
    except _BROKEN as cause:
        raise UsageError(
            f"{path} cannot be read as an .npz file: {cause}; give one in the ADM format"
        ) from cause
    if shape is None and pooled is None:
        content = ", ".join(sorted(names)) or "nothing"
        raise UsageError(
            f"{path} holds {content}; an ADM file has arr_0 (uint8 images), or mu and sigma, or "
            "both"
        )
    return AdmFile(path, shape, labels, pooled, spatial)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and dtype, from the header of a ``.npy`` stream."""
    version = np.lib.format.read_magic(member)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _checked_shape(
    path: Path, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]
) -> tuple[int, int, int, int]:
    if (
        dtype != np.uint8
        or len(shape) != 4
        or shape[3] not in (GREY, COLOUR)
        or fortran
        or 0 in shape
    ):
        raise UsageError(f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N,H,W,1 or 3]")
    count, height, width, channels = shape
    return count, height, width, channels


def _small_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert images to 1 or 3 channels: gray is repeated, and colors are averaged.

    Args:
        images: (N, H, W, 1 or 3) uint8.
        channels: 1 or 3.

    Returns:
        (N, H, W, channels) uint8.
    """
    if images.shape[3] == channels:
        return images
    if channels == COLOUR:
        return np.broadcast_to(images, (*images.shape[:3], COLOUR))
    return np.asarray(np.rint(images.mean(axis=3, keepdims=True)), np.uint8)
