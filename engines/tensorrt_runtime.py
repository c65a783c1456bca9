"""TensorRT engines on a device: loaded once, and run by every session in contexts of its own.

An execution context is made for each engine and set of input shapes, because a context whose shapes change must run
once before it can be captured. All contexts of a session share one scratch allocation: they run one after the other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from goc_deploy.engines.host import host_array
from goc_deploy.engines.plugin.registration import register_plugin
from goc_deploy.engines.tensorrt_kernels import KernelCache
from goc_deploy.engines.tensorrt_library import Library, message_log
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import ALIGNMENT, DTYPE_BYTES, NOTHING, Buffer, Device, Engine, Footprint, Launch, Stream

KEPT_MESSAGES = 100
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """An engine whose bytes were verified.

    Attributes:
        name: for messages.
        content: the bytes.
        uses_plugin: whether it holds a layer of the plugin.
        reads_first: whether an output may lie on an input of its shape: one kernel, or the plugin, which read what they
            overwrite first. Of several kernels one may read what another has overwritten.
        reads_weights: whether its weights lie beside it, at addresses.
        scratch_bytes: scratch memory at the largest shapes, as far as the builder told.
    """

    name: str
    content: memoryview
    uses_plugin: bool
    reads_first: bool
    reads_weights: bool = False
    scratch_bytes: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Weight:
    """A weight on the device, for all engines that read it; and where it came from, which therefore stays there."""

    source: Buffer
    buffer: Buffer


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Context:
    """An execution context with fixed shapes, and the addresses that it has now. It lives as long as a launch on it."""

    context: Any
    addresses: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class _Lane:
    """What the engines of one session share.

    Attributes:
        scratch: memory that a run uses and leaves; None where no engine needs any.
        aside: where outputs go that nobody asked for, or that are copied to their place afterwards.
        contexts: by engine and input shapes.
    """

    scratch: Buffer | None
    aside: list[Buffer] = field(default_factory=list)
    contexts: WeakValueDictionary[tuple[Any, ...], _Context] = field(default_factory=WeakValueDictionary)


class TensorrtEngine:
    """An engine with the weights that it reads at an address."""

    def __init__(self, backend: TensorrtBackend, stored: StoredEngine, engine: Any) -> None:
        self._backend, self._name, self._engine, self._reads_first = backend, stored.name, engine, stored.reads_first
        self.weights: dict[str, _Weight] = {}
        mode = backend.library.trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.dtypes: Mapping[str, str] = {
            name: DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name) for name in names
        }
        self.inputs = frozenset(name for name in names if engine.get_tensor_mode(name) == mode.INPUT)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], stream: Stream | None = None) -> Launch:
        """See `goc_deploy.protocols.Engine.bind`.

        Raises:
            EngineDirError: a name, type or shape that the engine does not have.
            EnvironmentUnsupportedError: an address that TensorRT does not take, or a context that cannot be made.
        """
        backend, stream = self._backend, stream or self._backend.own_stream
        stream.wait()  # the first call of a thread to CUDA, which then has the context that the plugin asks for
        inputs = {**{name: weight.buffer for name, weight in self.weights.items()}, **inputs}
        self._check(inputs, outputs)
        lane = backend.lane(stream)
        held = self._context(lane, {name: buffer.shape for name, buffer in inputs.items()})
        shapes = {name: tuple(held.context.get_tensor_shape(name)) for name in self.dtypes.keys() - self.inputs}
        for name, buffer in outputs.items():
            if shapes[name] != buffer.shape:
                raise self._misfit(name, f"{list(shapes[name])}", buffer)
        moved = [name for name in outputs if not self._reads_first and _lies_on(outputs[name], inputs)]
        unwanted = sorted(shapes.keys() - outputs.keys())
        aside = {
            name: backend.aside(lane, index, shapes[name], self.dtypes[name])
            for index, name in enumerate([*moved, *unwanted])
        }
        bound, copies = {**outputs, **aside}, [(aside[name], outputs[name]) for name in moved]
        addresses = tuple((name, buffer.pointer) for name, buffer in (*inputs.items(), *bound.items()))
        context, handle, keep = held.context, stream.handle, (inputs, bound)

        def run(_: Any = keep) -> None:
            if held.addresses is not addresses:
                for name, pointer in addresses:
                    if not context.set_tensor_address(name, pointer):
                        raise EnvironmentUnsupportedError(f"{self._name}: TensorRT refuses the address of {name}")
                held.addresses = addresses
            if not context.execute_async_v3(handle):
                raise EnvironmentUnsupportedError(f"{self._name} does not run: {backend.last_error()}")
            for source, target in copies:
                stream.copy(source, target)

        return run

    def _context(self, lane: _Lane, shapes: Mapping[str, tuple[int, ...]]) -> _Context:
        key = (id(self._engine), *sorted(shapes.items()))
        held = lane.contexts.get(key)
        if held is None:
            context = self._backend.library.new_context(self._engine, self._backend.kernels)
            if context is None:
                raise EnvironmentUnsupportedError(
                    f"{self._name}: no execution context can be made: {self._backend.last_error()}"
                )
            if lane.scratch is not None:
                context.set_device_memory(lane.scratch.pointer, lane.scratch.nbytes)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise EngineDirError(
                        f"{self._name} does not take {name} of shape {list(shape)}: {self._backend.last_error()}; build the engines again"
                    )
            held = lane.contexts[key] = _Context(context)
        return held

    def _check(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        for name, buffer in [*inputs.items(), *outputs.items()]:
            if self.dtypes.get(name) != buffer.dtype or (name in self.inputs) != (name in inputs):
                raise self._misfit(name, "", buffer)
            if buffer.pointer % ALIGNMENT:
                raise EnvironmentUnsupportedError(
                    f"{self._name}: {name} {list(buffer.shape)} lies at an address that is no multiple of {ALIGNMENT}, which TensorRT "
                    "does not take; for this width of the model use guidance (an even number of rows), or --backend onnxruntime"
                )
        missing = sorted(self.inputs - inputs.keys())
        if missing:
            raise EngineDirError(f"{self._name} has an input {missing[0]!r} that nobody binds; build the engines again")

    def _misfit(self, name: str, shape: str, buffer: Buffer) -> EngineDirError:
        return EngineDirError(
            f"{self._name} has tensor {name!r} as {self.dtypes.get(name)} {shape} but the manifest implies {buffer.dtype} "
            f"{list(buffer.shape)}; build the engines again"
        )


def _lies_on(output: Buffer, inputs: Mapping[str, Buffer]) -> bool:
    return any(output.overlaps(buffer) for buffer in inputs.values())


def _place(source: Buffer) -> tuple[Any, ...]:
    """By which engines find that they read the same weight."""
    return (source.pointer, source.shape, source.dtype)


class TensorrtBackend:
    """TensorRT or TensorRT for RTX, on engines that are there.

    Args:
        library: which TensorRT.
        device: where engines run.
        engines: SHA-256 of an ONNX file -> the engine that stands for it.
        report: what `describe` adds, such as which engines these are.
        kernels: where compiled kernels are kept, or None.
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
        self.own_stream = device.stream()
        self.passed_over: Mapping[str, str] = NOTHING
        self._engines, self._report, self.kernels = engines, report, kernels
        self._messages = message_log(library.trt, KEPT_MESSAGES)
        self._runtime = library.trt.Runtime(self._messages)
        self._loaded: dict[str, Any] = {}  # name of a stored engine -> what TensorRT made of it
        self._engine_bytes = 0  # of these
        self._weights: WeakValueDictionary[tuple[Any, ...], _Weight] = WeakValueDictionary()
        self._lanes: WeakKeyDictionary[Stream, _Lane] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:
        """Engines, the weights that they read at an address, and the scratch memory of the largest; see `Backend`."""
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
        """SHA-256 of every ONNX file that an engine stands for."""
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
            EngineDirError: no engine was built from this graph.
            EnvironmentUnsupportedError: TensorRT refuses the engine.
            ResourceError: the weights do not fit.
        """
        stored = self._engines.get(sha256(onnx).hexdigest())
        if stored is None:
            raise EngineDirError(f"{self.name} has no engine for this graph; build the engines again")
        with self._lock:  # TensorRT does not say that deserialising is safe in parallel
            engine = TensorrtEngine(self, stored, self._deserialized(stored))
            for name, buffer in {**initializers, **inputs}.items():
                if name in engine.inputs:
                    engine.weights[name] = self._uploaded(buffer)
            self.own_stream.wait()
        return engine

    def _uploaded(self, source: Buffer) -> _Weight:
        """A weight on the device, uploaded unless another engine reads it."""
        weight = self._weights.get(_place(source))
        if weight is None:
            weight = self._weights[_place(source)] = _Weight(source, self.allocate(source.shape, source.dtype))
            self.own_stream.upload(host_array(source), weight.buffer)
        return weight

    def check_replaceable(self, engine: Engine, weights: Set[str]) -> None:
        """Check that an engine reads its weights at addresses.

        Raises:
            EnvironmentUnsupportedError: it was built with them inside.
        """
        assert isinstance(engine, TensorrtEngine)
        if weights - engine.inputs:
            raise EnvironmentUnsupportedError(
                f"these engines of {self.name} hold their weights, which cannot be exchanged; build engines with "
                "--engine-weights shared and load again"
            )

    def replace_weights(self, engine: Engine, initializers: Mapping[str, Buffer], inputs: Mapping[str, Buffer]) -> bool:
        """Upload other values to where engines read them; an engine that shares a weight with another finds it done."""
        assert isinstance(engine, TensorrtEngine)
        given = {**initializers, **inputs}
        with self.own_stream.held(), self._lock:
            for name, source in given.items():
                weight = engine.weights[name]
                if weight.source.pointer != source.pointer:
                    self._weights.pop(_place(weight.source), None)
                    self._weights[_place(source)] = weight
                    weight.source = source  # before the upload: if that fails, the former values must be uploaded again
                    self.own_stream.upload(host_array(source), weight.buffer)
            self.own_stream.wait()
        return True

    def _deserialized(self, stored: StoredEngine) -> Any:
        if stored.name not in self._loaded:
            if stored.uses_plugin:
                register_plugin(self.library.trt)
            engine = self._runtime.deserialize_cuda_engine(stored.content)
            if engine is None:
                raise EnvironmentUnsupportedError(
                    f"{self.name} {self.library.version} does not load {stored.name}: {self.last_error()}; build the engines again"
                )
            self._loaded[stored.name] = engine
            self._engine_bytes += len(stored.content)
        return self._loaded[stored.name]

    def lane(self, stream: Stream) -> _Lane:
        """What engines share on a stream; scratch memory for the largest engine that is loaded.

        Raises:
            ResourceError: the scratch memory does not fit.
        """
        with self._lock:
            needed = self._scratch_bytes
            lane = self._lanes.get(stream)
            if lane is None:
                lane = self._lanes[stream] = _Lane(self.allocate((needed,), "uint8") if needed else None)
            if needed > (lane.scratch.nbytes if lane.scratch else 0):
                raise ResourceError(
                    "an engine was loaded that needs more scratch memory than this session has; load again"
                )
            return lane

    @property
    def _scratch_bytes(self) -> int:
        """Scratch memory of the largest engine that is loaded."""
        return max((int(engine.device_memory_size_v2) for engine in self._loaded.values()), default=0)

    def aside(self, lane: _Lane, index: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Memory of a session for the ``index``-th output of an engine that is not written where it belongs."""
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if index == len(lane.aside) or lane.aside[index].nbytes < nbytes:
            lane.aside[index : index + 1] = [self.allocate((nbytes,), "uint8")]
        memory = lane.aside[index]
        return Buffer(memory.pointer, shape, dtype, memory.owner)

    def last_error(self) -> str:
        """The last error that TensorRT logged."""
        return next(iter(self._messages.errors()[-1:]), "TensorRT gives no reason")

    def keep_compiled(self) -> None:
        """Keep the kernels that TensorRT for RTX compiled."""
        if self.kernels is not None:
            self.kernels.keep()

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `goc_deploy.protocols.Device.allocate`."""
        return self.device.allocate(shape, dtype)

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer."""
        self.own_stream.upload(values, target)
        self.own_stream.wait()

    def download(self, source: Buffer) -> np.ndarray:
        """A copy of a buffer."""
        return self.own_stream.download(source)

    def describe(self) -> dict[str, Any]:
        """Library, device and engines."""
        return {
            "backend": self.name,
            "version": self.library.version,
            "provider": self.library.trt.__name__,
            **self.device.describe(),
            **self._report,
            "weight_bytes": self._engine_bytes + sum(weight.buffer.nbytes for weight in self._weights.values()),
            "scratch_bytes": self._scratch_bytes,
            "passed_over": dict(self.passed_over),
        }
