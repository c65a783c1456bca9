"""CUDA C++ to machine code with NVRTC from its wheel: no CUDA toolkit, and no GPU, is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError

_WHEEL_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")  # of CUDA 13 and of CUDA 12
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")


@functools.cache
def _nvrtc() -> Any:
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise EnvironmentUnsupportedError(
        "NVRTC, which compiles the plugin, is not installed; run: pip install nvidia-cuda-nvrtc"
    )


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for folder in _WHEEL_FOLDERS:
            yield from map(str, sorted(Path(root, folder).glob("libnvrtc.so.*"), reverse=True))
    yield from _NAMES


def cubin_from_source(source: str, name: str, capability: str) -> bytes:
    """Compile for one GPU.

    Args:
        source: CUDA C++.
        name: of the source in messages.
        capability: compute capability, such as ``8.6``.

    Raises:
        EnvironmentUnsupportedError: NVRTC is missing, does not know the GPU, or refuses the source.
    """
    library, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture=sm_{capability.replace('.', '')}", "--std=c++17"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(options), array)
        if status:
            _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(library.nvrtcGetProgramLog(program, log))
            reason = log.value.decode(errors="replace").strip() or library.nvrtcGetErrorString(status).decode()
            raise EnvironmentUnsupportedError(
                f"NVRTC cannot compile {name} for compute capability {capability}: {reason}"
            )
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int) -> None:
    if status:
        raise EnvironmentUnsupportedError(f"NVRTC fails: {_nvrtc().nvrtcGetErrorString(status).decode()}")
