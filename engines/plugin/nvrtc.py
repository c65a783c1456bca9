"""CUDA C++ to machine code with NVRTC, by NVIDIA's cuda-bindings, without CUDA toolkit or GPU.

The bindings find NVRTC's wheel, and load the library that NVRTC compiles with, which NVRTC of CUDA
13.0 does not find by itself.
"""

from __future__ import annotations

from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError

MISSING = (
    "NVRTC, which compiles the update kernel, cannot be loaded ({}); run: pip install "
    "cuda-bindings nvidia-cuda-nvrtc"
)


def cubin_from_source(source: str, name: str, capability: str) -> bytes:
    """Compile for one GPU.

    Args:
        source: CUDA C++.
        name: name of the source in messages.
        capability: compute capability, such as ``8.6``.

    Raises:
        EnvironmentUnsupportedError: NVRTC is missing, does not know the GPU, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc

        program = _checked(
            nvrtc, *nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
        )
    except (ImportError, RuntimeError) as cause:  # RuntimeError: the bindings find no library
        raise EnvironmentUnsupportedError(MISSING.format(str(cause).splitlines()[0])) from cause
    options = [f"--gpu-architecture=sm_{capability.replace('.', '')}".encode(), b"--std=c++17"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, *nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, *nvrtc.nvrtcGetProgramLog(program, log))
            reason = log.rstrip(b"\0").decode(errors="replace").strip() or _text(nvrtc, status)
            raise EnvironmentUnsupportedError(
                f"NVRTC cannot compile {name} for compute capability {capability}: {reason}"
            )
        cubin = bytearray(_checked(nvrtc, *nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, *nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, status: Any, *values: Any) -> Any:
    """Return the value of a call, or None; every call of the bindings returns its status first."""
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EnvironmentUnsupportedError(f"NVRTC fails: {_text(nvrtc, status)}")
    return values[0] if values else None


def _text(nvrtc: Any, status: Any) -> str:
    return str(nvrtc.nvrtcGetErrorString(status)[1].decode())
