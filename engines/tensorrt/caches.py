"""Files that TensorRT makes for one kind of GPU and reads again: kernels that were compiled, tactics that were timed.

They lie beside the engines, one for each GPU name and driver, and are listed in the manifest: what is read is what it
lists, byte for byte.
"""

from __future__ import annotations

import re
from pathlib import Path

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engines.driver import device_name, load_driver
from goc_deploy.errors import EnvironmentUnsupportedError

_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")


def cache_path(target: Target, kind: str, gpu: str, driver: int | None) -> str:
    """Where a cache lies in an engine directory.

    GPUs of one compute capability are not enough: TensorRT refuses a cache of another model, or of an older driver.

    Args:
        target: of the engines that it belongs to.
        kind: ``kernels`` or ``timings``.
        gpu: name of the GPU, such as ``NVIDIA L40S``.
        driver: major version of CUDA that the driver has, or None where there is no driver.
    """
    version = "" if driver is None else f"-cuda{driver}"
    return f"{target.folder}/{kind}-{_UNSAFE.sub('-', gpu).strip('-.')}{version}.cache"


def driver_version() -> int | None:
    """Major version of CUDA that the driver has, or None where there is no driver."""
    try:
        return int(load_driver().cuDriverGetVersion()) // 1000
    except EnvironmentUnsupportedError:
        return None


def gpu_name() -> str:
    """Name of the first GPU that this process may see.

    Raises:
        EnvironmentUnsupportedError: there is no driver or no GPU.
    """
    driver = load_driver()
    return device_name(driver, driver.cuDeviceGet(0))


def read_cache(directory: EngineDir, path: str) -> bytes:
    """The bytes of a cache, empty if the manifest lists none.

    Raises:
        EngineDirError: missing, truncated, changed.
        SafetyError: a link, or not a regular file.
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
