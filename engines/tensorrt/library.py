"""TensorRT 10, TensorRT 11 and TensorRT-RTX behind one import, and what each can build for.

Only what all three share is used. They differ in name, and in what they build for: TensorRT builds on and for the GPU of
this machine, TensorRT-RTX for any list of GPUs on any machine.
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
_FIRST_BY_DEFAULT = "8.0"  # Ampere: the first with bf16
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
        """Whether kernels are compiled for the GPU by the process that runs them."""
        return hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")

    def new_context(self, engine: Any, kernels: KernelCache | None = None) -> Any:
        """An execution context without scratch memory, or None.

        TensorRT for RTX compiles kernels for the shapes that it meets. It is told to do so at once, because what runs until
        then would be what a CUDA graph records; those that ``kernels`` has are not compiled again.
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
    """A logger that keeps what it is told, or the last ``most`` messages."""

    class MessageLog(trt.ILogger):  # type: ignore[misc]  # the class exists once the library is imported
        """Keeps everything: the layers of an engine are listed at the most talkative level only."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: deque[tuple[Any, str]] = deque(maxlen=most)
            self.count = 0  # of all messages so far

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity, text))
            self.count += 1

        def errors(self, since: int = 0) -> list[str]:
            """Errors among the messages after the first ``since``."""
            severity = trt.ILogger.Severity
            return self._of((severity.INTERNAL_ERROR, severity.ERROR), since)

        def memory(self, since: int) -> list[str]:
            """Errors and warnings that memory is too little, among the messages after the first ``since``."""
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
    """Whether a message of TensorRT is about memory that is not there; each of its parts words that differently."""
    return bool(_OUT_OF_MEMORY.search(text))


def library_from_backend(backend: str) -> Library:
    """Import a TensorRT.

    Raises:
        UsageError: no such backend.
        EnvironmentUnsupportedError: it is not installed, or too old.
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
    library: Library, capabilities: tuple[str, ...], precision: Precision
) -> Target:
    """What to build for.

    Args:
        library: what builds.
        capabilities: asked for, such as ``8.6``; empty is the default of the library.
        precision: of the engine directory.

    Raises:
        UsageError: a capability that the library cannot build for, or that lacks the precision.
        EnvironmentUnsupportedError: TensorRT without a GPU, or on one that lacks the precision.
    """
    known = (
        _known_capabilities(library) if library.cross_compiles else (driver.device_capability(),)
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
                f"`EngineOptions.capabilities={capability}`: {library.backend} {library.version} {where} {', '.join(known)}"
            )
        if precision == "bf16" and _number(capability) < _FIRST_WITH_BF16:
            raise UsageError(
                f"`EngineOptions.capabilities={capability}`: that GPU has no bf16; leave it out, or export with `precision=fp16`"
            )
    return Target(library.backend, library.version, this_platform(), chosen)


def check_target(library: Library, capability: str, precision: Precision) -> None:
    """Check that a library can build for the GPU of this machine, before anything is built.

    Args:
        library: what builds.
        capability: of the GPU, such as ``9.0``.
        precision: of the engine directory.

    Raises:
        EnvironmentUnsupportedError: it has no target for the GPU, or the GPU lacks the precision.
    """
    known = _known_capabilities(library) if library.cross_compiles else (capability,)
    if capability not in known:
        raise EnvironmentUnsupportedError(
            f"{library.backend} {library.version} has no target {capability}, only {', '.join(known)}; "
            "use `backend=tensorrt`, or onnxruntime-cuda"
        )
    if precision == "bf16" and _number(capability) < _FIRST_WITH_BF16:
        raise EnvironmentUnsupportedError(
            f"a GPU of compute capability {capability} has no bf16; export with `precision=fp16`"
        )


def this_platform() -> str:
    """Operating system and machine, such as ``linux-x86_64``."""
    return f"{platform.system().lower()}-{platform.machine()}"


def _known_capabilities(library: Library) -> tuple[str, ...]:
    """``SM86`` to ``8.6``, ``SM120`` to ``12.0``, ascending."""
    members = library.trt.ComputeCapability.__members__
    digits = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return tuple(sorted((f"{d[:-1]}.{d[-1]}" for d in digits), key=_number))


def _number(capability: str) -> tuple[int, ...]:
    try:
        major, minor = capability.split(".")
        return int(major), int(minor)
    except ValueError:
        raise UsageError(f"`EngineOptions.capabilities={capability}` must look like 8.6") from None
