"""Which TensorRT can be tested on the GPU of this machine."""

from __future__ import annotations

import pytest

from goc_deploy.engines import driver
from goc_deploy.engines.tensorrt_library import Library, library_from_backend, target_from_options
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError


def library_here(backend: str, precision: str) -> Library:
    """A TensorRT that builds for this GPU; the test is skipped, with the reason, where there is none."""
    try:
        library = library_from_backend(backend)
        target_from_options(library, (driver.device_capability(),), precision)
    except (EnvironmentUnsupportedError, UsageError) as reason:
        pytest.skip(str(reason))
    return library
