"""Errors of goc_deploy from the exceptions of ONNX Runtime.

ONNX Runtime has one class for most failures, and a bound run raises plain ``RuntimeError``. Only
the text distinguishes full memory from a broken graph.
"""

from __future__ import annotations

import re

import onnxruntime

from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, GocError, ResourceError

LOADING, RUNNING = "refuses a graph of the engine", "cannot run a graph of the engine"
SHOWN_CHARACTERS = 300

_MEMORY = re.compile(
    r"bad_alloc|smaller than requested bytes|"
    r"failed to allocate memory|cannot allocate memory|out of memory|CUDA (failure|error) 2\b|"
    r"ALLOC(ATION)?_FAILED",
    re.IGNORECASE,
)
_FILES = re.compile(r"too many open files|\bEMFILE\b|\bENFILE\b", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(CUDA|CUDNN|CUBLAS|CUBLASLT|CURAND|CUFFT) (failure|error)|\b(CUDNN|CUBLAS)_STATUS_|"
    r"\bCUDA_ERROR_|: EP_FAIL :|"
    r"cannot open shared object file|device (is )?lost",
    re.IGNORECASE,
)
_KERNEL = re.compile(r"NOT_IMPLEMENTED|could not find an implementation", re.IGNORECASE)
_SOURCE_LINE = re.compile(r"/onnxruntime_src/\S+:\d+ [^)]*\) ")


def error_from_ort(cause: Exception, doing: str, provider: str = "CPU") -> GocError:
    """Return the error to raise for an exception of ONNX Runtime.

    Args:
        cause: the exception, from creating a session or from a run.
        doing: ``LOADING`` or ``RUNNING``.
        provider: ``CPU`` or ``CUDA``, for the message.

    Returns:
        ``cause`` itself if it is a `GocError`; ResourceError for memory and file descriptors;
        EnvironmentUnsupportedError for the device, its libraries, and kernels that this ONNX
        Runtime lacks; otherwise EngineDirError.
    """
    if isinstance(cause, GocError):
        return cause
    text, version = str(cause), f"ONNX Runtime {onnxruntime.__version__}"
    reason = _printable(text)
    if isinstance(cause, MemoryError) or _MEMORY.search(text):
        return ResourceError(
            f"{version} {doing} because memory is full: {reason}; free memory, or use a smaller "
            "batch size"
        )
    if _FILES.search(text):
        return ResourceError(
            f"{version} {doing} because this process has too many open files: {reason}; raise the "
            "limit (ulimit -n)"
        )
    if _DEVICE.search(text):
        return EnvironmentUnsupportedError(
            f"{version} {doing} on this device: {reason}; check its driver and libraries"
        )
    if _KERNEL.search(text):
        return EnvironmentUnsupportedError(
            f"{version} has no {provider} kernel for this graph ({reason}); "
            "export with `precision=fp32`"
        )
    return EngineDirError(f"{version} {doing}: {reason}; export again")


def _printable(text: str) -> str:
    """Return the first line without ONNX Runtime's source position; names may hold anything."""
    line = _SOURCE_LINE.sub("", text.strip().split("\n", 1)[0])[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in line)
