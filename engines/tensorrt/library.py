"""TensorRT 10, TensorRT 11 and TensorRT-RTX behind one import, and the GPUs each can build for.

The code uses only what all three share. They differ in name and in their targets: TensorRT builds
on and for the GPU of this machine, TensorRT-RTX for any list of GPUs on any machine.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from goc_deploy.engine_dir.keys import ENGINE_BACKENDS, Target
from goc_deploy.engines import driver
from goc_deploy.engines.tensorrt.kernel_cache import KernelCache
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.precision import Precision

_PACKAGES = {"tensorrt-rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "tensorrt")}
_FIRST_BY_DEFAULT = "8.0"  # Ampere, the first with bf16
_FIRST_WITH_BF16 = (8, 0)
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|allocator error|could not be allocated", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Library:
    """An imported TensorRT.

    Attributes:
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        trt: the module.
    """

    backend: str
    trt: Any

    @property
    def version(self) -> str:
        """The library's version in full."""
        return str(self.trt.__version__)

    @property
    def cross_compiles(self) -> bool:
        """Whether engines are built for GPUs that this machine may not have."""
        return self.backend == "tensorrt-rtx"

    @property
    def compiles_at_load(self) -> bool:
        """Whether the process that runs an engine compiles its kernels for the GPU."""
        return hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")

    def new_context(self, engine: Any, kernels: KernelCache | None = None) -> Any:
        """Create an execution context without scratch memory, or return None.

        TensorRT for RTX compiles kernels for the shapes that occur. It is told to do so at once,
        because a CUDA graph would otherwise record the fallback that runs until then. Kernels in
        ``kernels`` are not compiled again.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.compiles_at_load:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        specialised = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = specialised
        if kernels is not None:
            kernels.attach(config)
        return engine.create_execution_context(config)


def message_log(trt: Any, most: int | None = None) -> Any:
    """Create a logger that keeps all messages, or the last ``most`` messages."""

    # mypy: the base class exists only after the library is imported.
    class MessageLog(trt.ILogger):  # type: ignore[misc]
        """Keeps all levels: only the most verbose one lists the layers of an engine."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: deque[tuple[Any, str]] = deque(maxlen=most)
            self.count = 0  # number of all messages so far

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity, text))
            self.count += 1

        def errors(self, since: int = 0) -> list[str]:
            """Return the errors among the messages after the first ``since``."""
            severity = trt.ILogger.Severity
            return self._of((severity.INTERNAL_ERROR, severity.ERROR), since)

        def memory(self, since: int) -> list[str]:
            """Return messages about too little memory after the first ``since`` messages."""
            severity = trt.ILogger.Severity
            told = self._of((severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING), since)
            return [text for text in told if is_out_of_memory(text)]

        def _of(self, severities: tuple[Any, ...], since: int) -> list[str]:
            skipped = len(self.lines) - (self.count - since)
            return [
                text
                for severity, text in list(self.lines)[max(skipped, 0) :]
                if severity in severities
            ]

    return MessageLog()


def is_out_of_memory(text: str) -> bool:
    """Whether a message is about missing memory; each part of TensorRT words that differently."""
    return bool(_OUT_OF_MEMORY.search(text))


def library_from_backend(backend: str) -> Library:
    """Import a TensorRT.

    Raises:
        UsageError: the backend is unknown.
        EnvironmentUnsupportedError: the library is not installed, or too old.
    """
    if backend not in ENGINE_BACKENDS:
        raise UsageError(
            f"backend {backend!r} builds no engines; use {' or '.join(ENGINE_BACKENDS)}"
        )
    module, extra = _PACKAGES[backend]
    try:
        trt = importlib.import_module(module)
    except ImportError as cause:
        raise EnvironmentUnsupportedError(
            f"{backend} cannot be imported ({cause}); run: pip install 'goc_deploy[{extra}]'"
        ) from cause
    if not hasattr(trt, "IPluginV3"):
        raise EnvironmentUnsupportedError(
            f"{backend} {trt.__version__} is too old; install 10.3 or newer"
        )
    return Library(backend, trt)


def target_from_options(
    library: Library, capabilities: tuple[str, ...], precision: Precision, gpu: int = 0
) -> Target:
    """Choose the target of a build.

    Args:
        library: the TensorRT library.
        capabilities: requested capabilities, such as ``8.6``; empty is the library's default.
        precision: precision of the engine directory.
        gpu: number of the GPU that a library builds on, without meaning if it needs none.

    Raises:
        UsageError: the library cannot build for a capability, or the GPU lacks the precision.
        EnvironmentUnsupportedError: TensorRT has no GPU, or one that lacks the precision.
    """
    known = (
        _known_capabilities(library) if library.cross_compiles else (driver.device_capability(gpu),)
    )
    usual = (
        tuple(c for c in known if _number(c) >= _number(_FIRST_BY_DEFAULT))
        if library.cross_compiles
        else known
    )
    chosen = tuple(sorted(set(capabilities), key=_number)) or usual
    if not capabilities and not library.cross_compiles:
        check_target(library, known[0], precision)
    for capability in chosen:
        if capability not in known:
            where = (
                "can build for"
                if library.cross_compiles
                else "builds for the GPU of this machine only,"
            )
            raise UsageError(
                f"`EngineOptions.capabilities={capability}`: {library.backend} {library.version} "
                f"{where} {', '.join(known)}"
            )
        if precision == "bf16" and _number(capability) < _FIRST_WITH_BF16:
            raise UsageError(
                f"`EngineOptions.capabilities={capability}`: that GPU has no bf16; leave it "
                "out, or export with `precision=fp16`"
            )
    return Target(library.backend, library.version, this_platform(), chosen)


def check_target(library: Library, capability: str, precision: Precision) -> None:
    """Check that a library can build for the GPU of this machine, before anything is built.

    Args:
        library: the TensorRT library.
        capability: compute capability of the GPU, such as ``9.0``.
        precision: precision of the engine directory.

    Raises:
        EnvironmentUnsupportedError: the library has no target for the GPU, or the GPU lacks the
            precision.
    """
    known = _known_capabilities(library) if library.cross_compiles else (capability,)
    if capability not in known:
        raise EnvironmentUnsupportedError(
            f"{library.backend} {library.version} has no target {capability}, "
            f"only {', '.join(known)}; use `backend=tensorrt`, or onnxruntime-cuda"
        )
    if precision == "bf16" and _number(capability) < _FIRST_WITH_BF16:
        raise EnvironmentUnsupportedError(
            f"a GPU of compute capability {capability} has no bf16; export with `precision=fp16`"
        )


def this_platform() -> str:
    """Return operating system and machine, such as ``linux-x86_64``."""
    return f"{platform.system().lower()}-{platform.machine()}"


def _known_capabilities(library: Library) -> tuple[str, ...]:
    """Return the capabilities of the library, ascending: ``SM86`` is ``8.6``."""
    members = library.trt.ComputeCapability.__members__
    digits = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return tuple(sorted((f"{d[:-1]}.{d[-1]}" for d in digits), key=_number))


def _number(capability: str) -> tuple[int, ...]:
    try:
        major, minor = capability.split(".")
        return int(major), int(minor)
    except ValueError:
        raise UsageError(f"`EngineOptions.capabilities={capability}` must look like 8.6") from None
