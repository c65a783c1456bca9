"""A TensorRT engine on a device: its execution contexts, and launches at fixed addresses.

Each engine has an execution context per set of input shapes, because a context must run once after
a change of shapes before it can be captured. All contexts of a session share one scratch
allocation, because they run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from goc_deploy.engines.tensorrt.scratch import use_scratch
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError
from goc_deploy.precision import ELEMENT_TYPES
from goc_deploy.protocols import ALIGNMENT, Buffer, Run, Stream

if TYPE_CHECKING:
    from goc_deploy.engines.tensorrt.backend import TensorrtBackend


# Dynamic input -> smallest, optimal and largest shape.
_Profile = Mapping[str, tuple[tuple[int, ...], ...]]
DTYPES = {kind.tensorrt: dtype for dtype, kind in ELEMENT_TYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """The verified bytes of an engine.

    Attributes:
        name: name for messages.
        content: the bytes.
        uses_plugin: whether it contains a layer of the plugin.
        reads_first: whether an output may share the memory of an input of its shape. That is safe
            for one kernel and for the plugin, which read before they write. With several kernels,
            one may read what another has overwritten.
        reads_weights: whether it reads its weights at addresses.
        scratch_bytes: scratch memory at the largest shapes, as far as the builder reported it.
    """

    name: str
    content: memoryview
    uses_plugin: bool
    reads_first: bool
    reads_weights: bool = False
    scratch_bytes: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Weight:
    """A weight on the device for all engines that read it, and its source, which stays alive."""

    source: Buffer
    buffer: Buffer


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Context:
    """An execution context with fixed shapes and its current addresses; launches keep it alive."""

    context: Any
    addresses: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class Lane:
    """Memory and contexts that the engines of one session share.

    Attributes:
        scratch: memory that a run uses only while it runs, or None if no engine needs any.
        aside: memory for outputs that are discarded or copied to their place afterwards.
        contexts: execution contexts by engine and input shapes.
    """

    scratch: Buffer | None
    aside: list[Buffer] = field(default_factory=list)
    contexts: WeakValueDictionary[tuple[Any, ...], _Context] = field(
        default_factory=WeakValueDictionary
    )


class TensorrtEngine:
    """An engine with the weights that it reads at an address."""

    def __init__(self, backend: TensorrtBackend, stored: StoredEngine, engine: Any) -> None:
        self._backend, self._name, self._engine, self._reads_first = (
            backend,
            stored.name,
            engine,
            stored.reads_first,
        )
        self.weights: dict[str, Weight] = {}
        mode = backend.library.trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.dtypes: Mapping[str, str] = {
            name: DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name)
            for name in names
        }
        self.inputs = frozenset(
            name for name in names if engine.get_tensor_mode(name) == mode.INPUT
        )
        dynamic = [
            name for name in sorted(self.inputs) if -1 in tuple(engine.get_tensor_shape(name))
        ]
        self._profiles: list[_Profile] = [
            {
                name: tuple(map(tuple, engine.get_tensor_profile_shape(name, index)))
                for name in dynamic
            }
            for index in range(engine.num_optimization_profiles)
        ]

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        """See `goc_deploy.protocols.Engine.bind`.

        Raises:
            EngineDirError: the engine does not have a name, type or shape.
            EnvironmentUnsupportedError: TensorRT does not take an address, or a context cannot be
                made.
            ResourceError: there is not enough memory for the context.
        """
        if stream is not None:
            return self._bound(inputs, outputs, stream)
        own = self._backend.own_stream  # all such launches share it, so they hold it
        with own.held():
            launch = self._bound(inputs, outputs, own)

        def run() -> None:
            with own.held():
                launch()

        return run

    def _bound(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], stream: Stream
    ) -> Run:
        backend = self._backend
        # The first CUDA call of a thread: it sets the context that the plugin asks for.
        stream.wait()
        inputs = {**{name: weight.buffer for name, weight in self.weights.items()}, **inputs}
        self._check(inputs, outputs)
        lane = backend.lane(stream)
        fixed = self._context(lane, stream, {name: buffer.shape for name, buffer in inputs.items()})
        shapes = {
            name: tuple(fixed.context.get_tensor_shape(name))
            for name in self.dtypes.keys() - self.inputs
        }
        for name, buffer in outputs.items():
            if shapes[name] != buffer.shape:
                raise self._misfit(name, f"{list(shapes[name])}", buffer)
        moved = [
            name for name in outputs if not self._reads_first and _lies_on(outputs[name], inputs)
        ]
        unwanted = sorted(shapes.keys() - outputs.keys())
        aside = {
            name: backend.aside(lane, index, shapes[name], self.dtypes[name])
            for index, name in enumerate([*moved, *unwanted])
        }
        bound, copies = {**outputs, **aside}, [(aside[name], outputs[name]) for name in moved]
        addresses = tuple(
            (name, buffer.pointer) for name, buffer in (*inputs.items(), *bound.items())
        )
        context, handle, keep = fixed.context, stream.handle, (inputs, bound)

        def run(_: Any = keep) -> None:
            if fixed.addresses is not addresses:
                for name, pointer in addresses:
                    if not context.set_tensor_address(name, pointer):
                        raise EnvironmentUnsupportedError(
                            f"{self._name}: TensorRT refuses the address of {name}"
                        )
                fixed.addresses = addresses
            before = backend.messages()
            if not context.execute_async_v3(handle):
                raise backend.failure(f"{self._name} does not run", before)
            for source, target in copies:
                stream.copy(source, target)

        return run

    def _context(
        self, lane: Lane, stream: Stream, shapes: Mapping[str, tuple[int, ...]]
    ) -> _Context:
        key = (id(self._engine), *sorted(shapes.items()))
        cached = lane.contexts.get(key)
        if cached is None:
            backend = self._backend
            before = backend.messages()
            context = backend.library.new_context(self._engine, backend.kernels)
            if context is None:
                raise backend.failure(f"{self._name}: no execution context can be made", before)
            if len(self._profiles) > 1:  # the profile must be chosen before any shape is set
                profile = _nearest(self._profiles, shapes)
                if not context.set_optimization_profile_async(profile, stream.handle):
                    raise backend.failure(
                        f"{self._name}: profile {profile} cannot be chosen", before
                    )
            use_scratch(context, lane.scratch)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    refused = f"{self._name} does not take {name} of shape {list(shape)}"
                    raise backend.failure(refused, before, EngineDirError)
            cached = lane.contexts[key] = _Context(context)
        return cached

    def _check(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        for name, buffer in [*inputs.items(), *outputs.items()]:
            if self.dtypes.get(name) != buffer.dtype or (name in self.inputs) != (name in inputs):
                raise self._misfit(name, "", buffer)
            if buffer.pointer % ALIGNMENT:
                raise EnvironmentUnsupportedError(
                    f"{self._name}: {name} {list(buffer.shape)} lies at an address that is "
                    f"no multiple of {ALIGNMENT}, which TensorRT does not take; for this width of "
                    "the model use guidance (an even number of rows), or `backend=onnxruntime`"
                )
        missing = sorted(self.inputs - inputs.keys())
        if missing:
            raise EngineDirError(
                f"{self._name} has an input {missing[0]!r} that nobody binds; build the engines "
                "again"
            )

    def _misfit(self, name: str, shape: str, buffer: Buffer) -> EngineDirError:
        return EngineDirError(
            f"{self._name} has tensor {name!r} as {self.dtypes.get(name)} {shape} but the manifest "
            f"implies {buffer.dtype} "
            f"{list(buffer.shape)}; build the engines again"
        )


def _nearest(profiles: Sequence[_Profile], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the index of the profile with the nearest optimal shapes, by the ratio of sizes."""

    def distance(index: int) -> float:
        optima = {name: optimum for name, (_, optimum, _) in profiles[index].items()}
        return sum(
            abs(math.log(math.prod(shapes[name]) / math.prod(optimum)))
            for name, optimum in optima.items()
        )

    return min(range(len(profiles)), key=distance)


def _lies_on(output: Buffer, inputs: Mapping[str, Buffer]) -> bool:
    return any(output.overlaps(buffer) for buffer in inputs.values())
