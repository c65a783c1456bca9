"""ONNX Runtime's CUDA provider on a device, for every user with an NVIDIA GPU.

All sessions put their work on one stream, which this backend owns, and no run waits. With several
streams, each launch would wait on the host. A collapsed step is one launch of our kernel, without
ONNX Runtime. A session records its launches as its own CUDA graph if it can. Documentation:
onnxruntime.ai, "CUDA Execution Provider".
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from goc_deploy.engines.cuda import CudaDevice
from goc_deploy.engines.ort import OrtBackend, OrtEngine, register_arena
from goc_deploy.engines.ort_errors import RUNNING, error_from_ort
from goc_deploy.engines.plugin.accumulate import kernel_from_signature
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.host_memory import host_array
from goc_deploy.protocols import NOTHING, Buffer, Engine, Footprint, Run, Stream

logger = logging.getLogger(__name__)

LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
_graph_ids = itertools.count(1)  # 0 and -1 have other meanings in ONNX Runtime


@functools.cache
def shared_arena(device: int) -> None:
    """Register one arena on a GPU for all sessions; otherwise each has one that doubles."""
    register = partial(state.create_and_register_allocator_v2, "CUDAExecutionProvider")
    register_arena("Cuda", device, lambda where, how: register(where, {}, how))


class OrtCudaEngine(OrtEngine):
    """A session on the stream of its backend.

    Args:
        session: session of ONNX Runtime.
        inputs: inputs that are the same on every run.
        device: number of the GPU.
        without_graphs: creates the same session without CUDA graphs; None if this one has none.
    """

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, Buffer],
        device: int,
        without_graphs: Callable[[], Any] | None,
    ) -> None:
        super().__init__(session, inputs, ("cuda", device), "CUDA")
        self.without_graphs = without_graphs

    def _bound(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None,  # noqa: ARG002
    ) -> Run:
        return (
            self.run_of(inputs, outputs)
            if self.without_graphs is None
            else _RecordedRun(self, inputs, outputs)
        )

    def run_of(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Make a run of the current session that does not wait; it records its own graph."""
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.without_graphs is not None:
            options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))
        return partial(self._session.run_with_iobinding, self._binding(inputs, outputs), options)

    def give_up_graphs(self, reason: Exception) -> None:
        """Use a session without CUDA graphs from now on."""
        assert self.without_graphs is not None
        logger.warning("a session goes on without a CUDA graph, which it cannot record: %s", reason)
        self._session, self.without_graphs = self.without_graphs(), None


class _RecordedRun:
    """A run that ONNX Runtime records the first time; recording may turn out to be impossible."""

    def __init__(
        self, engine: OrtCudaEngine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        self._engine, self._tensors, self._recorded = engine, (inputs, outputs), False
        self._run = engine.run_of(inputs, outputs)

    def __call__(self) -> None:
        if not self._recorded and self._engine.without_graphs is not None:
            try:
                self._run()
            except Exception as reason:
                if isinstance(error_from_ort(reason, RUNNING, "CUDA"), ResourceError):
                    raise
                self._engine.give_up_graphs(reason)
            else:
                self._recorded = True
                return
        if not self._recorded:
            self._run, self._recorded = self._engine.run_of(*self._tensors), True
        self._run()


class OrtCudaBackend(OrtBackend):
    """ONNX Runtime on a GPU.

    Args:
        device: device of the tensors.
        threads: see `OrtBackend`.
        shared_pool: see `OrtBackend`.

    Raises:
        EnvironmentUnsupportedError: this ONNX Runtime lacks the CUDA provider, or our kernels
            cannot be compiled.
    """

    name = "onnxruntime-cuda"
    stacks = True
    provider = "CUDA"

    def __init__(self, device: CudaDevice, threads: int = 0, *, shared_pool: bool = True) -> None:
        self._cuda, self._graphless = device, 0
        super().__init__(threads, shared_pool=shared_pool, device=device)
        self._weight_bytes: WeakKeyDictionary[OrtCudaEngine, int] = WeakKeyDictionary()
        self._kernels = device.kernels
        self.prepare_process(shared_pool=shared_pool)

    def prepare_process(self, *, shared_pool: bool) -> None:
        """Load the CUDA libraries of NVIDIA's wheels, and register the arena that sessions share.

        The system searches for other libraries.
        """
        from cuda import pathfinder

        for name in LIBRARIES:
            try:
                pathfinder.load_nvidia_dynamic_lib(name)
            except pathfinder.DynamicLibNotFoundError:
                logger.info("no package has the CUDA library %s; the system may", name)
        if shared_pool:
            shared_arena(self._cuda.index)

    def _own_stream(self) -> Stream:
        """Return a stream without recording: no other capture may contain ONNX Runtime's calls."""
        return self._cuda.stream(graphs=False)

    def stream(self) -> Stream:
        """Return the one stream of all sessions: ONNX Runtime has a stream per session."""
        return self._stream

    def predict_engine(self, signature: str, dtype: str) -> Engine | None:
        """Return our kernel, which the driver launches."""
        return kernel_from_signature(signature, dtype, self._kernels)

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:
        """Count the weights, a copy per session; ONNX Runtime does not report activations."""
        return Footprint(weights=sum(sum(files.values()) for files in graphs.values()))

    def load(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        inputs: Mapping[str, Buffer] = NOTHING,
        *,
        runs_once: bool = False,
    ) -> OrtCudaEngine:
        """Load a graph, with CUDA graphs if ONNX Runtime can record all of it.

        Raises:
            EnvironmentUnsupportedError: the provider does not start, or has no kernel for a node.
            EngineDirError: ONNX Runtime does not accept the graph.
            ResourceError: the GPU has not enough memory.
        """

        def create_session(*, graphs: bool) -> Any:
            session = self._session(
                onnx, initializers, runs_once=runs_once, **self._provider_options(graphs=graphs)
            )
            if self._provider_name not in session.get_providers():
                raise EnvironmentUnsupportedError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot start its "
                    f"{self._provider_name}; check that its CUDA libraries are installed (pip "
                    "install 'goc_deploy[cuda]')"
                )
            return session

        placed = {name: self._placed(buffer) for name, buffer in inputs.items()}
        nbytes = sum(buffer.nbytes for buffer in (*initializers.values(), *inputs.values()))
        session, graphs = self._recording(create_session)
        engine = OrtCudaEngine(
            session,
            placed,
            self._cuda.index,
            partial(create_session, graphs=False) if graphs else None,
        )
        self._weight_bytes[engine] = nbytes
        return engine

    def _recording(self, create_session: Callable[..., Any]) -> tuple[Any, bool]:
        """Create a session, with CUDA graphs if possible; also return whether it has them."""
        if self._cuda.graphs:
            try:
                return create_session(graphs=True), True
            except ResourceError:
                raise
            except Exception as reason:
                self._graphless += 1
                logger.info("a session has no CUDA graph: %s", reason)
        return create_session(graphs=False), False

    def _provider_options(self, *, graphs: bool) -> dict[str, str]:
        return {
            "device_id": str(self._cuda.index),
            "user_compute_stream": str(self._stream.handle),
            "use_tf32": "0",  # TF32, the provider's default, has three digits less than fp32
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(graphs)),
        }

    def _placed(self, buffer: Buffer) -> Buffer:
        """Copy a host buffer to memory that the device can read."""
        placed = self.allocate(buffer.shape, buffer.dtype)
        self.upload(host_array(buffer), placed)
        return placed

    def describe(self) -> dict[str, Any]:
        """Describe as `OrtBackend`, with the weights and the sessions without a CUDA graph."""
        return {
            **super().describe(),
            "weight_bytes": sum(self._weight_bytes.values()),
            "sessions_without_graph": self._graphless,
        }
