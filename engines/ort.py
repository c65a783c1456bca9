"""ONNX Runtime on the CPU, and code that its CUDA provider (`goc_deploy.engines.ort_cuda`) shares.

All sessions of a process share one thread pool, because the threads of several pools compete while
they spin. Weights are initializers in memory that was verified before, so ONNX Runtime opens no
file.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from goc_deploy.engines.host import HostDevice
from goc_deploy.engines.ort_errors import LOADING, RUNNING, error_from_ort
from goc_deploy.engines.ort_quantized import optimizers_in_the_way, session_entries
from goc_deploy.engines.ort_stream import OrtStream
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, UsageError
from goc_deploy.host_memory import available_bytes, host_array
from goc_deploy.precision import ELEMENT_TYPES
from goc_deploy.protocols import NOTHING, Buffer, Device, Engine, Footprint, Run, Stream

logger = logging.getLogger(__name__)

_DTYPE_OF_ORT_TYPE = {f"tensor({kind.onnx_name})": dtype for dtype, kind in ELEMENT_TYPES.items()}

GROW_AS_REQUESTED = 1

_pool_lock = threading.Lock()
_pool: tuple[str, int] | None = None  # (who created it, threads)


def shared_pool_of_process(threads: int) -> tuple[str, int]:
    """Create the process-wide thread pool and memory arena once.

    Args:
        threads: size; 0 lets ONNX Runtime choose (one per core).

    Returns:
        Who created the pool (``shared`` or ``made by the host program``), and the requested size. A
        later call cannot change the size, and writes that to the log.
    """
    global _pool
    with _pool_lock:
        if _pool is None:
            try:
                onnxruntime.set_global_thread_pool_sizes(threads, 1)
                _pool = ("shared", threads)
            except Exception as error:
                logger.warning(
                    "the ONNX Runtime thread pool that this process has already is used as it is: "
                    "%s",
                    error,
                )
                _pool = ("made by the host program", 0)
            register_arena("Cpu", 0, state.create_and_register_allocator, available_bytes())
        elif threads not in (0, _pool[1]):
            logger.warning(
                "the thread pool of this process keeps its size %d; %d threads are ignored",
                _pool[1],
                threads,
            )
        return _pool


def register_arena(
    memory: str,
    device: int,
    register: Callable[[Any, Any], None],
    most_bytes: int | None = None,
) -> None:
    """Register one arena for the activations of all units, which run one after the other.

    Each unit then finds memory that is warm.

    Args:
        memory: ONNX Runtime's name for a kind of memory.
        device: number of the device.
        register: ONNX Runtime's call for the process, with the place and the growth of the arena.
        most_bytes: largest size. A graph that expands its inputs beyond it fails, before the system
            ends the process. None is no limit.
    """
    limit = {} if most_bytes is None else {"max_mem": most_bytes}
    where = state.OrtMemoryInfo(
        memory, state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, device, state.OrtMemType.DEFAULT
    )
    try:
        register(where, state.OrtArenaCfg({"arena_extend_strategy": GROW_AS_REQUESTED, **limit}))
    except Exception as error:
        logger.warning(
            "the ONNX Runtime memory arena that this process has already is used as it is: %s",
            error,
        )


class OrtEngine:
    """A session whose tensors are bound by address.

    Args:
        session: session of ONNX Runtime.
        inputs: inputs that are the same on every run.
        memory: ONNX Runtime's name for the device of the buffers, and its number.
        provider: name of the provider for messages.
    """

    def __init__(
        self, session: Any, inputs: Mapping[str, Buffer], memory: tuple[str, int], provider: str
    ) -> None:
        self._session, self._inputs, self._memory, self._provider = (
            session,
            inputs,
            memory,
            provider,
        )
        tensors = [*session.get_inputs(), *session.get_outputs()]
        self._shapes = {arg.name: arg.shape for arg in tensors}
        self.dtypes: Mapping[str, str] = {
            arg.name: _DTYPE_OF_ORT_TYPE.get(arg.type, arg.type) for arg in tensors
        }

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        """See `goc_deploy.protocols.Engine.bind`; a run on the CPU is done when it returns."""
        inputs = {**self._inputs, **inputs}
        run, keep_alive = self._bound(inputs, outputs, stream), (inputs, dict(outputs))

        def launch(_: Any = keep_alive) -> None:
            try:
                run()
            except Exception as cause:
                raise error_from_ort(cause, RUNNING, self._provider) from cause

        return launch

    def _bound(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], stream: Stream | None
    ) -> Run:
        """Make a run on these tensors."""
        run, binding = self._session.run_with_iobinding, self._binding(inputs, outputs)
        if isinstance(stream, OrtStream):
            return lambda: run(binding, stream.options)
        return partial(run, binding)

    def _binding(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Any:
        for name, buffer in [*inputs.items(), *outputs.items()]:
            self._check(name, buffer)
        binding = self._session.io_binding()
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(
                    name,
                    *self._memory,
                    ELEMENT_TYPES[buffer.dtype].onnx,
                    list(buffer.shape),
                    buffer.pointer,
                )
        return binding

    def _check(self, name: str, buffer: Buffer) -> None:
        shape, dtype = self._shapes.get(name, []), self.dtypes.get(name)
        fits = len(shape) == len(buffer.shape) and all(
            not isinstance(f, int) or f == size for f, size in zip(shape, buffer.shape, strict=True)
        )
        if dtype != buffer.dtype or not fits:
            raise EngineDirError(
                f"a graph has tensor {name!r} as {dtype} {shape} but the manifest implies "
                f"{buffer.dtype} {list(buffer.shape)}; export again"
            )


class OrtBackend:
    """ONNX Runtime on the CPU.

    Args:
        threads: size of the thread pool; 0 is one per core.
        shared_pool: one pool for all sessions of the process. It is faster, but from then on ONNX
            Runtime refuses any session of the process that has its default
            ``use_per_session_threads``. Without it every unit has a pool whose threads do not spin.

    Raises:
        UsageError: ``threads`` is negative.
        EnvironmentUnsupportedError: separate pools are wanted but the process has a shared one, or
            this ONNX Runtime lacks the provider.
    """

    name = "onnxruntime"
    stacks = False
    provider = "CPU"
    runtime: Any = onnxruntime

    def __init__(
        self, threads: int = 0, *, shared_pool: bool = True, device: Device | None = None
    ) -> None:
        self.device: Device = device or HostDevice()
        self._stream = self._own_stream()
        self.passed_over: Mapping[str, str] = NOTHING
        if self._provider_name not in self.runtime.get_available_providers():
            raise EnvironmentUnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} has no {self._provider_name}; run: pip "
                "install onnxruntime-gpu"
            )
        if threads < 0:
            raise UsageError(f"threads must not be negative, got {threads}")
        if not shared_pool and _pool is not None:
            raise EnvironmentUnsupportedError(
                "this process has a shared ONNX Runtime thread pool already, so shared_pool=False "
                "is not possible; use it from the first load on"
            )
        self._shared_pool = shared_pool
        self._pool, self._threads = (
            shared_pool_of_process(threads) if shared_pool else ("per unit", threads)
        )

    @property
    def _provider_name(self) -> str:
        return f"{self.provider}ExecutionProvider"

    def _own_stream(self) -> Stream:
        """Return the stream for uploads and downloads of the backend itself."""
        return self.device.stream()

    def stream(self) -> Stream:
        """See `goc_deploy.protocols.Backend.stream`."""
        return OrtStream()

    def predict_engine(self, signature: str, dtype: str) -> Engine | None:  # noqa: ARG002
        """Return None: on the CPU, predictions are graphs."""
        return None

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:  # noqa: ARG002
        """Return nothing: ONNX Runtime does not report it."""
        return Footprint()

    def load(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        inputs: Mapping[str, Buffer] = NOTHING,
        *,
        runs_once: bool = False,
    ) -> OrtEngine:
        """Load a graph; ONNX Runtime copies initializers, and packs matrices for repeated runs.

        Raises:
            EnvironmentUnsupportedError: this ONNX Runtime has no kernel for it (bf16 on the CPU).
            EngineDirError: ONNX Runtime does not accept the graph.
            ResourceError: there is not enough memory, or there are too many open files.
        """
        return OrtEngine(
            self._session(onnx, initializers, runs_once=runs_once),
            inputs,
            ("cpu", 0),
            self.provider,
        )

    def _session(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        *,
        runs_once: bool,
        **provider: str,
    ) -> Any:
        """Create a session, with options of its provider."""
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = not self._shared_pool
        options.log_severity_level = 3
        # Run in the order of the graph. By default the sums of a prediction launch come last, when
        # their terms have left the CPU's cache.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = (
            False  # a pattern is a block of memory per unit; the shared arena serves all
        )
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self._shared_pool:
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            options.intra_op_num_threads = self._threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if runs_once:
            options.add_session_config_entry("session.disable_prepacking", "1")
        content, dtypes = bytes(onnx), {buffer.dtype for buffer in initializers.values()}
        for key, value in session_entries(content, dtypes).items():
            options.add_session_config_entry(key, value)
        try:
            values = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    _with_shape(buffer), ELEMENT_TYPES[buffer.dtype].onnx
                )
                for name, buffer in initializers.items()
            }
            if values:
                options.add_external_initializers(list(values), list(values.values()))
            return self.runtime.InferenceSession(
                content,
                options,
                providers=[(self._provider_name, provider)],
                disabled_optimizers=optimizers_in_the_way(content, dtypes, self.provider),
            )
        except Exception as cause:
            raise error_from_ort(cause, LOADING, self.provider) from cause

    def check_replaceable(self, engine: Engine, weights: Set[str]) -> None:
        """Accept everything: graphs are loaded again."""

    def replace_weights(
        self,
        engine: Engine,  # noqa: ARG002
        initializers: Mapping[str, Buffer],  # noqa: ARG002
        inputs: Mapping[str, Buffer],  # noqa: ARG002
    ) -> bool:
        """Return False: ONNX Runtime packs weights when it loads a graph."""
        return False

    def keep_compiled(self) -> None:
        """Do nothing: ONNX Runtime compiles nothing."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `goc_deploy.protocols.Device.allocate`."""
        return self.device.allocate(shape, dtype)

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer."""
        with self._stream.held():
            self._stream.upload(values, target)
            self._stream.wait()

    def download(self, source: Buffer) -> np.ndarray:
        """Copy a buffer to the host."""
        with self._stream.held():
            return self._stream.download(source)

    def describe(self) -> dict[str, Any]:
        """Describe version, provider and threads."""
        return {
            "backend": self.name,
            "version": onnxruntime.__version__,
            "provider": self._provider_name,
            **self.device.describe(),
            "threads": self._threads or "one per core",
            "thread_pool": self._pool,
            "passed_over": dict(self.passed_over),
        }


def _with_shape(buffer: Buffer) -> np.ndarray:
    """View an initializer as an array of its shape.

    ONNX Runtime takes the shape of a tensor of 4 bits from the array, and reads half as many bytes.
    """
    values = host_array(buffer)
    strides = [math.prod(buffer.shape[axis + 1 :]) for axis in range(len(buffer.shape))]
    return (
        values
        if values.shape == buffer.shape
        else np.lib.stride_tricks.as_strided(values, buffer.shape, strides, writeable=False)
    )
