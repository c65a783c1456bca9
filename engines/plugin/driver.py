"""The few calls of the CUDA driver that the plugin needs, by ctypes: which GPU there is, loading code, launching it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as cause:
        raise EnvironmentUnsupportedError(
            f"there is no NVIDIA driver here ({_LIBRARY} cannot be loaded); use a GPU machine (tensorrt-rtx builds engines without one)"
        ) from cause
    _check(library, library.cuInit(0), "cuInit")
    return library


def _check(library: Any, status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise EnvironmentUnsupportedError(f"the NVIDIA driver refuses {call}: {reason} ({status})")


def device_capability(device: int = 0) -> str:
    """Compute capability of a GPU, such as ``8.6``.

    Raises:
        EnvironmentUnsupportedError: there is no driver or no GPU.
    """
    library, handle = _driver(), ctypes.c_int()
    _check(library, library.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        status = library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        _check(library, status, "cuDeviceGetAttribute")
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


@dataclass(frozen=True, slots=True)
class DeviceFunction:
    """A function loaded into the current CUDA context."""

    handle: int

    def launch(self, blocks: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Launch on a stream with one parameter, passed by value. Neither waits nor allocates.

        Raises:
            EnvironmentUnsupportedError: the driver refuses.
        """
        library = _driver()
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        status = library.cuLaunchKernel(
            *(ctypes.c_void_p(self.handle), blocks, 1, 1, threads, 1, 1, 0, ctypes.c_void_p(stream), pointers, None)
        )
        _check(library, status, "cuLaunchKernel")


def function_from_cubin(cubin: bytes, name: str) -> DeviceFunction:
    """Load a function into the current CUDA context, which keeps it until the process ends.

    Raises:
        EnvironmentUnsupportedError: there is no context, or the code is for another GPU.
    """
    library, module, handle = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(library, library.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    status = library.cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
    _check(library, status, "cuModuleGetFunction")
    assert handle.value is not None
    return DeviceFunction(handle.value)


def current_context() -> int:
    """Handle of the current CUDA context.

    Raises:
        EnvironmentUnsupportedError: there is no driver, or no context.
    """
    library, handle = _driver(), ctypes.c_void_p()
    _check(library, library.cuCtxGetCurrent(ctypes.byref(handle)), "cuCtxGetCurrent")
    if handle.value is None:
        raise EnvironmentUnsupportedError("this thread has no CUDA context; make one before the plugin is used")
    return handle.value


def current_capability() -> str:
    """Compute capability of the GPU of the current CUDA context.

    Raises:
        EnvironmentUnsupportedError: there is no driver, or no context.
    """
    library, device = _driver(), ctypes.c_int()
    _check(library, library.cuCtxGetDevice(ctypes.byref(device)), "cuCtxGetDevice")
    return device_capability(device.value)
