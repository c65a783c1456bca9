"""Which TensorRT can be tested on the GPU of this machine."""

from __future__ import annotations

import pytest

from goc_deploy.engines import driver
from goc_deploy.engines.tensorrt.library import Library, check_target, library_from_backend
from goc_deploy.errors import EnvironmentUnsupportedError


def library_here(backend: str, precision: str) -> Library:
    """A TensorRT that builds for this GPU.

    If there is none, the test is skipped with the reason.
    """
    try:
        library = library_from_backend(backend)
        check_target(library, driver.device_capability(), precision)
    except EnvironmentUnsupportedError as reason:
        pytest.skip(str(reason))
    return library
