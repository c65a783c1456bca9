"""The CUDA driver by NVIDIA's cuda-bindings, with checked calls: devices, code and launches.

NVIDIA maintains two Python layers. cuda-bindings has the driver's own calls under their documented
names. The documentation of the driver is therefore the documentation of this code, and a stand-in
can enforce the driver's rules. A CUDA build of torch installs it. cuda-core is a layer above it
that hides captures and streams.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError, GocError, ResourceError

_LIBRARY = "libcuda.so.1"
_NAME_BYTES = 256


class Driver:
    """Calls of the driver by name; ``driver.cuMemAlloc(64)`` returns a value or a tuple.

    A call raises `ResourceError` if the GPU is out of memory, and `EnvironmentUnsupportedError` for
    every other failure.

    Args:
        bindings: ``cuda.bindings.driver``, or a stand-in for it, whose calls return a status first.
    """

    def __init__(self, bindings: Any) -> None:
        self.bindings = bindings

    def __getattr__(self, name: str) -> Any:
        function, success = getattr(self.bindings, name), self.bindings.CUresult.CUDA_SUCCESS

        @functools.wraps(function)
        def checked(*args: Any) -> Any:
            status, *values = function(*args)
            if status != success:
                raise self._failure(name, status)
            return values[0] if len(values) == 1 else tuple(values)

        self.__dict__[name] = checked
        return checked

    def _failure(self, call: str, status: Any) -> GocError:
        status_of_text, text = self.bindings.cuGetErrorString(status)
        reason = (
            text.decode()
            if status_of_text == self.bindings.CUresult.CUDA_SUCCESS
            else "unknown error"
        )
        message = f"the NVIDIA driver refuses {call}: {reason} ({int(status)})"
        if status == self.bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return ResourceError(
                f"{message}; use a smaller batch size, or end what else uses the GPU's memory"
            )
        return EnvironmentUnsupportedError(message)


@functools.cache
def load_driver() -> Driver:
    """Load the driver of this machine.

    Raises:
        EnvironmentUnsupportedError: there is no driver, it does not start, cuda-bindings is
            missing, or it is for a later CUDA.
    """
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as cause:
        raise EnvironmentUnsupportedError(
            f"there is no NVIDIA driver here ({_LIBRARY} cannot be loaded); use a GPU machine "
            "(tensorrt-rtx builds engines without one)"
        ) from cause
    try:
        from cuda.bindings import driver as bindings
    except ImportError as cause:
        raise EnvironmentUnsupportedError(
            f"cuda-bindings, which calls the NVIDIA driver, cannot be imported ({cause}); run: "
            "pip install 'goc_deploy[cuda]'"
        ) from cause
    driver = Driver(bindings)
    driver.cuInit(0)
    has, needs = driver.cuDriverGetVersion(), bindings.CUDA_VERSION
    if has // 1000 < needs // 1000:  # code for later minor versions runs, for major ones not
        raise EnvironmentUnsupportedError(
            f"the NVIDIA driver is for CUDA {_dotted(has)}, and cuda-bindings for CUDA "
            f"{_dotted(needs)}; update the driver"
        )
    return driver


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def device_capability(index: int = 0) -> str:
    """Return the compute capability of a GPU of this machine, such as ``8.6``.

    Raises:
        EnvironmentUnsupportedError: there is no driver or no such GPU.
    """
    driver = load_driver()
    return capability_of(driver, device_handle(driver, index))


def device_handle(driver: Driver, index: int) -> Any:
    """Return the handle of a device of those that this process may see.

    Raises:
        EnvironmentUnsupportedError: there is no such device.
    """
    count = driver.cuDeviceGetCount()
    if index >= count:
        raise EnvironmentUnsupportedError(
            f"there is no CUDA device {index}; the driver finds {count}"
        )
    return driver.cuDeviceGet(index)


def capability_of(driver: Driver, device: Any) -> str:
    """Return the compute capability of a device of the driver."""
    attribute = driver.bindings.CUdevice_attribute
    major = driver.cuDeviceGetAttribute(
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device
    )
    minor = driver.cuDeviceGetAttribute(
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device
    )
    return f"{major}.{minor}"


def device_name(driver: Driver, device: Any) -> str:
    """Return the name of a device of the driver, such as ``NVIDIA L40S``."""
    name: bytes = driver.cuDeviceGetName(_NAME_BYTES, device)
    return name.partition(b"\0")[0].decode()  # the bindings fill the rest with spaces


@dataclass(frozen=True, slots=True)
class DeviceFunction:
    """A function that was loaded into the current context."""

    driver: Driver
    function: Any

    def launch(self, blocks: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Launch on a stream with one parameter, passed by value; neither wait nor allocate.

        Raises:
            EnvironmentUnsupportedError: the driver refuses the launch.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        self.driver.cuLaunchKernel(
            self.function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0
        )


def functions_from_cubin(
    driver: Driver, cubin: bytes, names: Iterable[str]
) -> dict[str, DeviceFunction]:
    """Load code into the current CUDA context, which keeps it until the process ends.

    Raises:
        EnvironmentUnsupportedError: there is no context, or the code is for another GPU.
    """
    module = driver.cuModuleLoadData(cubin)
    return {
        name: DeviceFunction(driver, driver.cuModuleGetFunction(module, name.encode()))
        for name in names
    }


def current_context(driver: Driver) -> int:
    """Return the handle of the current CUDA context.

    Raises:
        EnvironmentUnsupportedError: this thread has no context.
    """
    handle = int(driver.cuCtxGetCurrent())
    if not handle:
        raise EnvironmentUnsupportedError(
            "this thread has no CUDA context; make one before the plugin is used"
        )
    return handle
