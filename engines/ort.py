"""ONNX Runtime backend: the CPU provider, or the CUDA provider on memory of a device that is handed in.

All sessions of a process share one thread pool: a pool per session has threads that spin against each other. Weights
are initialisers given from memory that was verified before, so ONNX Runtime opens no file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from goc_deploy.engines.host import HostDevice, host_array
from goc_deploy.engines.ort_errors import LOADING, RUNNING, error_from_ort
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, UsageError
from goc_deploy.protocols import NOTHING, Buffer, Device, Footprint, Launch, Stream

logger = logging.getLogger(__name__)

ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPE_OF_ORT_TYPE = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}

GROW_AS_REQUESTED = 1

_pool_lock = threading.Lock()
_pool: tuple[str, int] | None = None  # (who made it, threads)


def shared_pool_of_process(threads: int) -> tuple[str, int]:
    """Create the process-wide thread pool and memory arena once.

    Args:
        threads: size; 0 lets ONNX Runtime choose (one per core).

    Returns:
        Who made the pool (``shared`` or ``made by the host program``), and the size asked for then. A later call
        cannot change it and says so in the log.
    """
    global _pool
    with _pool_lock:
        if _pool is None:
            try:
                onnxruntime.set_global_thread_pool_sizes(threads, 1)
                _pool = ("shared", threads)
            except Exception as error:
                logger.warning("the ONNX Runtime thread pool that this process has already is used as it is: %s", error)
                _pool = ("made by the host program", 0)
            _register_shared_arena()
        elif threads not in (0, _pool[1]):
            logger.warning(
                "the thread pool of this process keeps its size %d; %d threads are ignored", _pool[1], threads
            )
        return _pool


def _register_shared_arena() -> None:
    """One arena for the activations of all units: they run one after the other, so each finds warm memory."""
    where = state.OrtMemoryInfo("Cpu", state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, state.OrtMemType.DEFAULT)
    try:
        state.create_and_register_allocator(where, state.OrtArenaCfg({"arena_extend_strategy": GROW_AS_REQUESTED}))
    except Exception as error:
        logger.warning("the ONNX Runtime memory arena that this process has already is used as it is: %s", error)


class OrtEngine:
    """A session whose tensors are bound by address."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Buffer], kind: str) -> None:
        self._session, self._inputs, self._kind = session, inputs, kind
        tensors = [*session.get_inputs(), *session.get_outputs()]
        self._shapes = {arg.name: arg.shape for arg in tensors}
        self.dtypes: Mapping[str, str] = {arg.name: _DTYPE_OF_ORT_TYPE.get(arg.type, arg.type) for arg in tensors}

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,  # noqa: ARG002
    ) -> Launch:
        """See `goc_deploy.protocols.Engine.bind`. A run is done when the call returns, whatever the stream."""
        binding = self._session.io_binding()
        inputs = {**self._inputs, **inputs}
        for name, buffer in [*inputs.items(), *outputs.items()]:
            self._check(name, buffer)
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, self._kind, 0, ONNX_TYPES[buffer.dtype], list(buffer.shape), buffer.pointer)
        session, keep_alive = self._session, (inputs, dict(outputs))

        def run(_: Any = keep_alive) -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as cause:
                raise error_from_ort(cause, RUNNING) from cause

        return run

    def _check(self, name: str, buffer: Buffer) -> None:
        found, dtype = self._shapes.get(name, []), self.dtypes.get(name)
        fits = len(found) == len(buffer.shape) and all(
            not isinstance(f, int) or f == size for f, size in zip(found, buffer.shape, strict=True)
        )
        if dtype != buffer.dtype or not fits:
            raise EngineDirError(
                f"a graph has tensor {name!r} as {dtype} {found} but the manifest implies {buffer.dtype} {list(buffer.shape)}; export again"
            )


class OrtBackend:
    """ONNX Runtime.

    Args:
        threads: size of the thread pool; 0 is one per core.
        shared_pool: one pool for all sessions of the process. It is faster, but from then on ONNX Runtime refuses any
            session of the process that is made with its default ``use_per_session_threads``. Without it every unit
            has a pool whose threads do not spin.
        device: where tensors lie, and with it the provider; the host by default.

    Raises:
        UsageError: ``threads`` is negative.
        EnvironmentUnsupportedError: own pools are asked for but the process has a shared one, or this ONNX Runtime
            lacks the provider.
    """

    stacks = False

    def __init__(self, threads: int = 0, *, shared_pool: bool = True, device: Device | None = None) -> None:
        self.device: Device = device or HostDevice()
        self.name = "onnxruntime" if self.device.kind == "cpu" else f"onnxruntime-{self.device.kind}"
        self._stream = self.device.stream()
        self.passed_over: Mapping[str, str] = NOTHING
        self._provider = PROVIDERS[self.device.kind]
        if self._provider not in onnxruntime.get_available_providers():
            raise EnvironmentUnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} has no {self._provider}; run: pip install onnxruntime-gpu"
            )
        if threads < 0:
            raise UsageError(f"threads must not be negative, got {threads}")
        if not shared_pool and _pool is not None:
            raise EnvironmentUnsupportedError(
                "this process has a shared ONNX Runtime thread pool already, so shared_pool=False is not possible; use it from the first load on"
            )
        self._shared_pool = shared_pool
        self._pool, self._threads = shared_pool_of_process(threads) if shared_pool else ("per unit", threads)

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:  # noqa: ARG002
        """Nothing: ONNX Runtime does not tell."""
        return Footprint()

    def load(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        inputs: Mapping[str, Buffer] = NOTHING,
        *,
        runs_once: bool = False,
    ) -> OrtEngine:
        """Load a graph. ONNX Runtime copies the initializers, and packs matrices unless the graph runs once.

        Raises:
            EnvironmentUnsupportedError: this ONNX Runtime has no kernel for it (bf16 on the CPU).
            EngineDirError: not a graph that ONNX Runtime accepts.
            ResourceError: memory or file descriptors do not suffice.
        """
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = not self._shared_pool
        options.log_severity_level = 3
        # As the graph says; by default the sums of a prediction launch come last, when their terms left the CPU's cache.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False  # a pattern is a block of memory per unit; the shared arena serves all
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self._shared_pool:
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            options.intra_op_num_threads = self._threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if runs_once:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            values = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    host_array(buffer), ONNX_TYPES[buffer.dtype]
                )
                for name, buffer in initializers.items()
            }
            if values:
                options.add_external_initializers(list(values), list(values.values()))
            session = onnxruntime.InferenceSession(bytes(onnx), options, providers=[self._provider])
        except Exception as cause:
            raise error_from_ort(cause, LOADING, self.device.kind.upper()) from cause
        if self._provider not in session.get_providers():
            raise EnvironmentUnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} cannot start its {self._provider}; check that its CUDA libraries are installed"
            )
        return OrtEngine(session, {name: self._placed(buffer) for name, buffer in inputs.items()}, self.device.kind)

    def _placed(self, buffer: Buffer) -> Buffer:
        """A host buffer where the device can read it."""
        if self.device.kind == "cpu":
            return buffer
        placed = self.allocate(buffer.shape, buffer.dtype)
        self.upload(host_array(buffer), placed)
        return placed

    def keep_compiled(self) -> None:
        """Nothing: ONNX Runtime compiles nothing."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `goc_deploy.protocols.Device.allocate`."""
        return self.device.allocate(shape, dtype)

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer."""
        self._stream.upload(values, target)
        self._stream.wait()

    def download(self, source: Buffer) -> np.ndarray:
        """A copy of a buffer."""
        return self._stream.download(source)

    def describe(self) -> dict[str, Any]:
        """Version, provider and threads."""
        return {
            "backend": self.name,
            "version": onnxruntime.__version__,
            "provider": self._provider,
            **self.device.describe(),
            "threads": self._threads or "one per core",
            "thread_pool": self._pool,
            "passed_over": dict(self.passed_over),
        }
