"""The TensorRT backend: engines loaded once for every session, with weights and scratch memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Set
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.engines.cuda import CudaDevice
from goc_deploy.engines.plugin.accumulate import AccumulateKernel
from goc_deploy.engines.plugin.registration import register_plugin
from goc_deploy.engines.tensorrt.engine import Lane, StoredEngine, TensorrtEngine, Weight
from goc_deploy.engines.tensorrt.kernel_cache import KernelCache
from goc_deploy.engines.tensorrt.library import Library, message_log
from goc_deploy.engines.tensorrt.scratch import needed_bytes
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, GocError, ResourceError
from goc_deploy.host_memory import host_array
from goc_deploy.precision import DTYPE_BYTES
from goc_deploy.protocols import NOTHING, Buffer, Device, Engine, Footprint, Stream

KEPT_MESSAGES = 100


def _place(source: Buffer) -> tuple[Any, ...]:
    """Return the key by which engines recognise that they read the same weight."""
    return (source.pointer, source.shape, source.dtype)


class TensorrtBackend:
    """TensorRT or TensorRT for RTX, with engines that exist.

    Args:
        library: the TensorRT library.
        device: the device that engines run on.
        engines: SHA-256 of an ONNX file -> the engine of that file.
        report: further content of `describe`, such as the names of the engines.
        kernels: the cache of compiled kernels, or None.
    """

    stacks = True

    def __init__(
        self,
        library: Library,
        device: Device,
        engines: Mapping[str, StoredEngine],
        report: Mapping[str, Any] = NOTHING,
        kernels: KernelCache | None = None,
    ) -> None:
        self.library, self.name, self.device = library, library.backend, device
        self.own_stream = device.stream()  # hold it before the lock is taken, never after
        self.passed_over: Mapping[str, str] = NOTHING
        self._engines, self._report, self.kernels = engines, report, kernels
        self._messages = message_log(library.trt, KEPT_MESSAGES)
        self._runtime = library.trt.Runtime(self._messages)
        self._loaded: dict[str, Any] = {}  # name of a stored engine -> TensorRT's engine
        self._engine_bytes = 0  # size of all loaded engines
        self._weights: WeakValueDictionary[tuple[Any, ...], Weight] = WeakValueDictionary()
        self._lanes: WeakKeyDictionary[Stream, Lane] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def stream(self) -> Stream:
        """Create a stream for one session."""
        return self.device.stream()

    def predict_engine(self, signature: str, dtype: str) -> Engine | None:
        """Return our kernel for accumulations.

        Predictions are engines, with the plugin if that needs fewer launches.
        """
        if taps_from_signature(signature) is None:
            return None
        assert isinstance(self.device, CudaDevice), "TensorRT runs on a GPU"
        return AccumulateKernel(signature, dtype, self.device.kernels)

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:
        """Count engines, weights at addresses, and the scratch memory of the largest engine."""
        stored = {digest: self._engines[digest] for digest in graphs if digest in self._engines}
        engines = {engine.name: engine for engine in stored.values()}
        apart = {
            path: size
            for digest, engine in stored.items()
            if engine.reads_weights
            for path, size in graphs[digest].items()
        }
        return Footprint(
            weights=sum(len(engine.content) for engine in engines.values()) + sum(apart.values()),
            scratch=max((engine.scratch_bytes for engine in engines.values()), default=0),
        )

    @property
    def graphs(self) -> Set[str]:
        """SHA-256 of every ONNX file that has an engine."""
        return self._engines.keys()

    def load(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        inputs: Mapping[str, Buffer] = NOTHING,
        *,
        runs_once: bool = False,  # noqa: ARG002
    ) -> TensorrtEngine:
        """Load the engine of a graph, and upload the weights that it reads at an address.

        Raises:
            EngineDirError: there is no engine for this graph.
            EnvironmentUnsupportedError: TensorRT refuses the engine.
            ResourceError: the engine or the weights do not fit.
        """
        stored = self._engines.get(sha256(onnx).hexdigest())
        if stored is None:
            raise EngineDirError(
                f"{self.name} has no engine for this graph; build the engines again"
            )
        # TensorRT does not document that deserializing is safe in parallel.
        with self.own_stream.held(), self._lock:
            engine = TensorrtEngine(self, stored, self._deserialized(stored))
            for name, buffer in {**initializers, **inputs}.items():
                if name in engine.inputs:
                    engine.weights[name] = self._uploaded(buffer)
            self.own_stream.wait()
        return engine

    def _uploaded(self, source: Buffer) -> Weight:
        """Return a weight on the device; it is uploaded unless another engine reads it."""
        weight = self._weights.get(_place(source))
        if weight is None:
            weight = self._weights[_place(source)] = Weight(
                source, self.allocate(source.shape, source.dtype)
            )
            self.own_stream.upload(host_array(source), weight.buffer)
        return weight

    def check_replaceable(self, engine: Engine, weights: Set[str]) -> None:
        """Check that an engine reads its weights at addresses.

        Raises:
            EnvironmentUnsupportedError: it was built with embedded weights.
        """
        assert isinstance(engine, TensorrtEngine)
        if weights - engine.inputs:
            raise EnvironmentUnsupportedError(
                f"these engines of {self.name} hold their weights, which cannot be "
                "exchanged; build engines with "
                "`EngineOptions.weight_mode=shared` and load again"
            )

    def replace_weights(
        self, engine: Engine, initializers: Mapping[str, Buffer], inputs: Mapping[str, Buffer]
    ) -> bool:
        """Upload new weights to the addresses that engines read; a shared weight only once."""
        assert isinstance(engine, TensorrtEngine)
        sources = {**initializers, **inputs}
        with self.own_stream.held(), self._lock:
            for name, source in sources.items():
                weight = engine.weights[name]
                if weight.source.pointer != source.pointer:
                    self._weights.pop(_place(weight.source), None)
                    self._weights[_place(source)] = weight
                    # Before the upload: if it fails, the former values must be uploaded again.
                    weight.source = source
                    self.own_stream.upload(host_array(source), weight.buffer)
            self.own_stream.wait()
        return True

    def _deserialized(self, stored: StoredEngine) -> Any:
        if stored.name not in self._loaded:
            if stored.uses_plugin:
                register_plugin(self.library.trt)
            before = self.messages()
            engine = self._runtime.deserialize_cuda_engine(stored.content)
            if engine is None:
                raise self.failure(
                    f"{self.name} {self.library.version} does not load {stored.name}", before
                )
            self._loaded[stored.name] = engine
            self._engine_bytes += len(stored.content)
        return self._loaded[stored.name]

    def lane(self, stream: Stream) -> Lane:
        """Return what engines share on a stream, with scratch memory for the largest engine.

        Raises:
            ResourceError: there is not enough memory.
        """
        with self._lock:
            needed = needed_bytes(self._loaded.values())
            lane = self._lanes.get(stream)
            if lane is None:
                lane = self._lanes[stream] = Lane(
                    self.allocate((needed,), "uint8") if needed else None
                )
            if needed > (lane.scratch.nbytes if lane.scratch else 0):
                raise ResourceError(
                    "an engine was loaded that needs more scratch memory than this session has; "
                    "load again"
                )
            return lane

    def aside(self, lane: Lane, index: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Return memory for an engine's ``index``-th output that is not written to its place."""
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if index == len(lane.aside) or lane.aside[index].nbytes < nbytes:
            lane.aside[index : index + 1] = [self.allocate((nbytes,), "uint8")]
        memory = lane.aside[index]
        return Buffer(memory.pointer, shape, dtype, memory.owner)

    def messages(self) -> int:
        """Count the messages that TensorRT has logged."""
        return int(self._messages.count)

    def failure(
        self, what: str, since: int, otherwise: type[GocError] = EnvironmentUnsupportedError
    ) -> GocError:
        """Make the error of a call that TensorRT refused.

        Args:
            what: the engine, and what was refused.
            since: `messages` before the call.
            otherwise: class of the error if it is not about memory or CUDA.
        """
        memory, errors = self._messages.memory(since), self._messages.errors(since)
        if memory:
            return ResourceError(
                f"{what}: there is not enough GPU memory ({'; '.join(memory)}); use a smaller "
                "batch size or fewer sessions, or end what else uses the GPU"
            )
        if any("cuda" in text.lower() for text in errors):
            return EnvironmentUnsupportedError(
                f"{what}: {errors[-1]}; check the driver, and run again"
            )
        return otherwise(
            f"{what}: {errors[-1] if errors else 'TensorRT gives no reason'}; build the engines "
            "again"
        )

    def keep_compiled(self) -> None:
        """Save the kernels that TensorRT for RTX compiled."""
        if self.kernels is not None:
            self.kernels.keep()

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `goc_deploy.protocols.Device.allocate`."""
        return self.device.allocate(shape, dtype)

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer."""
        with self.own_stream.held():
            self.own_stream.upload(values, target)
            self.own_stream.wait()

    def download(self, source: Buffer) -> np.ndarray:
        """Copy a buffer to the host."""
        with self.own_stream.held():
            return self.own_stream.download(source)

    def describe(self) -> dict[str, Any]:
        """Describe library, device and engines."""
        return {
            "backend": self.name,
            "version": self.library.version,
            "provider": self.library.trt.__name__,
            **self.device.describe(),
            **self._report,
            "weight_bytes": self._engine_bytes
            + sum(weight.buffer.nbytes for weight in self._weights.values()),
            "scratch_bytes": needed_bytes(self._loaded.values()),
            "passed_over": dict(self.passed_over),
        }
