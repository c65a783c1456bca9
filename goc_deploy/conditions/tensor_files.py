"""Named arrays from ``.npz`` and ``.safetensors`` files, which cannot execute code."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, deserialize

from goc_deploy.errors import GocError, UsageError
from goc_deploy.protocols import float32_from_bfloat16
from goc_deploy.strict_json import parse_json

SUFFIXES = (".npz", ".safetensors")
MAX_BYTES = 2**32
# An archive may unpack to this many times its size, and to this many more bytes.
MAX_RATIO, ALWAYS_UNPACKED = 20, 64 * 2**20
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}


def arrays_from_file(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a file, by name; bfloat16 is widened to float32.

    Raises:
        UsageError: the file is unreadable, damaged, or of another kind.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} must end in {' or '.join(SUFFIXES)}")
    try:
        _check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES} bytes; give a smaller file")
        if path.suffix == ".safetensors":
            return arrays_from_safetensors(path.read_bytes(), str(path))
        with open(path, "rb") as file:
            return arrays_from_npz(file, str(path))
    except OSError as cause:
        raise UsageError(f"{path} cannot be read: {cause}") from cause


def arrays_from_npz(file: BinaryIO, where: str) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file, unless it unpacks to far more than its size.

    Raises:
        UsageError: the file is damaged, of another kind, or a decompression bomb.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        packed = file.seek(0, os.SEEK_END)
        if unpacked > ALWAYS_UNPACKED + MAX_RATIO * packed:
            raise UsageError(
                f"{where} has {packed} bytes that unpack to {unpacked}; save it uncompressed"
            )
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays}
    except GocError:
        raise
    except Exception as cause:  # zipfile, zlib and NumPy raise many types for a damaged file
        raise UsageError(f"{where} cannot be read: {cause}") from cause


def latents_from_file(path: Path) -> np.ndarray:
    """Read x_T from a ``.npy`` file without running anything in it.

    Returns:
        (N, C, H, W), or (N, C, F, H, W) of videos.

    Raises:
        UsageError: unreadable, or not an array of numbers of such a shape.
    """
    latents = array_from_npy(path)
    if latents.ndim not in (4, 5) or not len(latents):
        raise UsageError(
            f"latents {path} have shape {list(latents.shape)}, expected [N,C,H,W], or [N,C,F,H,W] "
            "for videos"
        )
    return latents


def array_from_npy(path: Path) -> np.ndarray:
    """Read the array of a ``.npy`` file; never allocate more memory than the file has bytes.

    Raises:
        UsageError: the file is unreadable, damaged, or of another kind.
    """
    try:
        _check_regular(path)
        # open_memmap reads neither archives nor pickles.
        return np.array(np.lib.format.open_memmap(path, mode="r"))
    except GocError:
        raise
    except Exception as cause:  # as for archives
        raise UsageError(f"{path} cannot be read: {cause}") from cause


def _check_regular(path: Path) -> None:
    """Refuse devices and pipes, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} cannot be read: it is not a regular file")


def arrays_from_safetensors(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file; bfloat16 is widened to float32.

    ``safetensors.numpy`` cannot read bfloat16, so this function views the bytes that the package
    has checked.

    Raises:
        UsageError: the file is damaged, its header describes missing data, or a dtype is unknown.
    """
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as cause:
        raise UsageError(f"{where} is not a sound safetensors file: {cause}") from cause
    header_end = 8 + int.from_bytes(content[:8], "little")
    # The package accepts duplicate names; this refuses them.
    parse_json(content[8:header_end], f"the header of {where}", UsageError)
    arrays = {}
    for name, tensor in tensors:
        dtype = tensor["dtype"]
        if dtype not in _DTYPES:
            raise UsageError(f"{where}: the dtype of {name!r:.60} is {dtype}; use float32")
        values = np.frombuffer(tensor["data"], _DTYPES[dtype]).reshape(tensor["shape"])
        arrays[name] = float32_from_bfloat16(values) if dtype == "BF16" else values
    return arrays
