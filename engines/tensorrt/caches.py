"""Cache files of TensorRT for one kind of GPU: compiled kernels, and timings of tactics.

They are stored beside the engines, one for each GPU name and driver, and listed in the manifest.
Only files that match the manifest are read.
"""

from __future__ import annotations

import re
from pathlib import Path

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engines.driver import device_handle, device_name, load_driver
from goc_deploy.errors import EnvironmentUnsupportedError

_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")


def cache_path(target: Target, kind: str, gpu: str, driver: int | None) -> str:
    """Return the path of a cache in an engine directory.

    The compute capability is not enough: TensorRT refuses a cache of another GPU model, or of an
    older driver.

    Args:
        target: target of the engines that use the cache.
        kind: ``kernels`` or ``timings``.
        gpu: name of the GPU, such as ``NVIDIA L40S``.
        driver: major version of the driver's CUDA, or None without a driver.
    """
    version = "" if driver is None else f"-cuda{driver}"
    return f"{target.folder}/{kind}-{_UNSAFE.sub('-', gpu).strip('-.')}{version}.cache"


def driver_version() -> int | None:
    """Return the major version of the driver's CUDA, or None without a driver."""
    try:
        return int(load_driver().cuDriverGetVersion()) // 1000
    except EnvironmentUnsupportedError:
        return None


def gpu_name(index: int = 0) -> str:
    """Return the name of a GPU of those that this process may see.

    Raises:
        EnvironmentUnsupportedError: there is no driver or no GPU.
    """
    driver = load_driver()
    return device_name(driver, device_handle(driver, index))


def read_cache(directory: EngineDir, path: str) -> bytes:
    """Read a cache; the result is empty if the manifest lists none.

    Raises:
        EngineDirError: the file is missing, truncated or changed.
        SafetyError: the file is a link, or not a regular file.
    """
    return bytes(directory.read(path)) if path in directory else b""


def keep_cache(directory: Path, path: str, content: bytes) -> None:
    """Write a cache, and list it in the manifest.

    Raises:
        ConflictError, ResourceError: the directory cannot be written.
    """
    amended(
        directory,
        f"keeping {path} in {directory}",
        lambda current: Amendment(current.manifest, {path: content}),
    )
