"""ONNX Runtime's CUDA provider on a stand-in GPU.

Its sessions are those of the CPU provider; they run late, on the stream that they were given.

It holds the backend to what the provider documents: fp32 without TF32, one stream, no wait at the
end of a run, graphs by number, each on the addresses that it was recorded with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.ort_cuda import OrtCudaBackend
from goc_deploy.precision import DTYPE_BYTES, ELEMENT_TYPES
from goc_deploy.protocols import NUMPY_DTYPES
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.pipeline import Pipeline
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.driver import Fault, Work
from tests.stand_ins.kernels import Span

DTYPES = {kind.onnx: dtype for dtype, kind in ELEMENT_TYPES.items()}


class Binding:
    """See ``IOBinding``: addresses by name."""

    def __init__(self, device: StandInDevice) -> None:
        self._device = device
        self.inputs: dict[str, tuple[Span, str, list[int]]] = {}
        self.outputs: dict[str, tuple[Span, str, list[int]]] = {}

    def bind_input(
        self, name: str, kind: str, device: int, number: int, shape: list[int], pointer: int
    ) -> None:
        self.inputs[name] = self._bound(kind, device, number, shape, pointer)

    def bind_output(
        self, name: str, kind: str, device: int, number: int, shape: list[int], pointer: int
    ) -> None:
        self.outputs[name] = self._bound(kind, device, number, shape, pointer)

    def _bound(self, kind: str, device: int, number: int, shape: list[int], pointer: int) -> Any:
        assert (kind, device) == ("cuda", self._device.index)
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[DTYPES[number]]
        return Span(pointer, nbytes), DTYPES[number], shape


class StandInSession:
    """See ``InferenceSession``."""

    def __init__(
        self,
        runtime: StandInRuntime,
        content: bytes,
        options: Any,
        providers: list[Any],
        disabled_optimizers: list[str],
    ) -> None:
        ((name, chosen),) = providers
        assert name == "CUDAExecutionProvider"
        assert (chosen["device_id"], chosen["use_tf32"]) == (str(runtime.device.index), "0")
        self._runtime, self._device = runtime, runtime.device
        self.handle = int(chosen["user_compute_stream"])
        assert options.get_session_config_entry("session.use_env_allocators") == "1"
        self._graphs = chosen["enable_cuda_graph"] == "1"
        if self._graphs and runtime.refuses_graphs == "at load":
            raise RuntimeError(
                "This session cannot use the graph capture feature: nodes on the CPU"
            )
        if runtime.out_of_memory == "at load":
            raise RuntimeError(
                "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of "
                "size 7"
            )
        self._real = onnxruntime.InferenceSession(
            content,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled_optimizers,
        )
        self._recorded: dict[tuple[int, int], dict[str, Span]] = {}  # (thread, graph) -> addresses
        runtime.sessions.add(self)
        self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self._device)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        if self._runtime.out_of_memory == "in a run":
            raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")
        stream = self._device.stream_of(self.handle)
        reads = {name: span for name, (span, *_) in binding.inputs.items()}
        writes = {name: span for name, (span, *_) in binding.outputs.items()}
        if self._graphs:
            self._check_graph(options, {**reads, **writes})
        self._check_overlaps(reads, writes)
        self._runtime.runs += 1

        def run() -> None:
            feeds = {name: self._array(*bound).copy() for name, bound in binding.inputs.items()}
            for name, values in zip(
                binding.outputs, self._real.run(list(binding.outputs), feeds), strict=True
            ):
                self._array(*binding.outputs[name])[...] = values

        stream.put(Work("a session", reads, writes, run))
        if options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            raise Fault("a run waits for the GPU")

    def _check_graph(self, options: Any, addresses: dict[str, Span]) -> None:
        number = int(options.get_run_config_entry("gpu_graph_id"))
        assert number > 0
        if self._runtime.refuses_graphs == "in a run":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        key = (threading.get_ident(), number)
        self._runtime.calls.append("replay" if key in self._recorded else "record")
        if self._recorded.setdefault(key, addresses) != addresses:
            raise Fault("a graph is replayed for other addresses than it was recorded with")

    def _check_overlaps(self, reads: Mapping[str, Span], writes: Mapping[str, Span]) -> None:
        for name, span in writes.items():
            for other, read in reads.items():
                if span.overlaps(read):
                    raise Fault(f"a session writes {name} over {other}, which it reads")

    def _array(self, span: Span, dtype: str, shape: list[int]) -> np.ndarray:
        return self._device.bytes_at(span, "a tensor").view(NUMPY_DTYPES[dtype]).reshape(shape)


class StandInRuntime(SimpleNamespace):
    """The module. ``calls`` lists what graphs did, ``runs`` counts runs.

    Attributes:
        refuses_graphs: ``at load``, ``in a run`` or empty.
        out_of_memory: ``at load``, ``in a run`` or empty.
    """

    def __init__(
        self, device: StandInDevice, refuses_graphs: str = "", out_of_memory: str = ""
    ) -> None:
        super().__init__(device=device, refuses_graphs=refuses_graphs, out_of_memory=out_of_memory)
        self.sessions: WeakSet[StandInSession] = WeakSet()
        self.calls: list[str] = []
        self.runs = 0

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(
        self,
        content: bytes,
        options: Any,
        providers: list[Any],
        disabled_optimizers: list[str],
    ) -> StandInSession:
        return StandInSession(self, content, options, providers, disabled_optimizers)


class StandInOrtCudaBackend(OrtCudaBackend):
    """The real backend on a `StandInRuntime`."""

    def __init__(self, runtime: StandInRuntime) -> None:
        self.runtime = runtime
        super().__init__(runtime.device)

    def prepare_process(self, *, shared_pool: bool) -> None:
        """There are no CUDA libraries, and the CPU provider has an arena of its own."""


def cuda_pipeline(
    directory: Path, plan: str, sessions: int = 1, *, graphs: bool = True, **refusals: str
) -> tuple[Pipeline, StandInRuntime]:
    """A real pipeline of the backend ``onnxruntime-cuda`` on stand-ins."""
    runtime = StandInRuntime(StandInDevice(graphs=graphs), **refusals)
    opened, backend = EngineDir.open(directory), StandInOrtCudaBackend(runtime)
    return load_pipelines(opened, backend, [plan], None, sessions)[0], runtime
