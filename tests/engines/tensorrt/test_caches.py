from __future__ import annotations

import pytest

from goc_deploy.engine_dir.keys import Target
from goc_deploy.engines import driver
from goc_deploy.engines.tensorrt import caches
from goc_deploy.errors import EnvironmentUnsupportedError

TARGET = Target("tensorrt-rtx", "1.7", "linux-x86_64", ("8.9",))


@pytest.mark.parametrize(
    ("gpu", "version", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 13, "kernels-NVIDIA-GeForce-RTX-4090-cuda13.cache"),
        ("NVIDIA RTX 6000 Ada (Max-Q) / 2", 12, "kernels-NVIDIA-RTX-6000-Ada-Max-Q-2-cuda12.cache"),
        ("../..", None, "kernels-.cache"),
    ],
)
def test_the_file_is_named_after_the_gpu_and_the_driver(
    gpu: str, version: int | None, name: str
) -> None:
    assert caches.cache_path(TARGET, "kernels", gpu, version) == f"{TARGET.folder}/{name}"


def test_without_a_driver_there_is_no_version_and_no_name() -> None:
    try:
        driver.device_capability()
    except EnvironmentUnsupportedError:
        assert caches.driver_version() is None
        with pytest.raises(EnvironmentUnsupportedError, match=r"there is no NVIDIA driver here"):
            caches.gpu_name()
    else:
        assert caches.driver_version() >= 12
        assert caches.gpu_name()
