"""Files that TensorRT makes for one kind of GPU and reads again: kernels that were compiled, tactics that were timed.

They lie beside the engines, one for each GPU name and driver, and are listed in the manifest: what is read is what it
lists, byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from goc_deploy.disk import directory_lock, disk_errors, replacing
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry, read_manifest, read_verified
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


def read_cache(directory: Path, path: str) -> bytes:
    """The bytes of a cache, empty where the manifest lists none.

    Raises:
        EngineDirError: missing, truncated, changed.
        SafetyError: a link, or not a regular file.
    """
    listed = {file.path: file for file in read_manifest(directory).files}
    return bytes(read_verified(directory, listed[path])) if path in listed else b""


def keep_cache(directory: Path, path: str, content: bytes) -> None:
    """Write a cache, file first, then the manifest that lists it, each in one step.

    Raises:
        ConflictError, ResourceError: the directory cannot be written.
    """
    with directory_lock(directory), disk_errors(f"keeping {path} in {directory}"):
        manifest = read_manifest(directory)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory / path) as temporary:
            temporary.write_bytes(content)
        others = [file for file in manifest.files if file.path != path]
        files = tuple(sorted([*others, file_entry(directory, path)], key=lambda file: file.path))
        with replacing(directory / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_to_json(replace(manifest, files=files)), encoding="utf-8")
