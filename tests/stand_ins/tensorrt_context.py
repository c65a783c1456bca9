"""Execution contexts of the stand-in for TensorRT, and what they are made with.

They hold a run to the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from goc_deploy.protocols import ALIGNMENT
from tests.stand_ins.driver import Work
from tests.stand_ins.kernels import Fault, Span

if TYPE_CHECKING:
    from tests.stand_ins.tensorrt import Engine


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, text: str) -> None: ...


class TensorIOMode(Enum):
    INPUT, OUTPUT = 1, 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class ComputeCapability(Enum):
    NONE, CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = range(8)  # no 9.0 and no 10.0


class RuntimeCache:
    """Which kernels were compiled, as a text: an engine and its shapes stand for the kernels."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, content: bytes) -> bool:
        sound = content.startswith(b"kernels")
        self.kernels.update(content.decode().splitlines()[1:] if sound else ())
        return sound

    def serialize(self) -> bytes:
        return "\n".join(["kernels", *sorted(self.kernels)]).encode()


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    strategy = ExecutionContextAllocationStrategy.STATIC
    cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Context:
    """See ``IExecutionContext``."""

    def __init__(
        self,
        engine: Engine,
        strategy: ExecutionContextAllocationStrategy,
        cache: RuntimeCache | None = None,
    ) -> None:
        engine.device.forbid_in_capture("make an execution context")
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine, self._device, self._cache = engine, engine.device, cache
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0 if engine.num_optimization_profiles == 1 else None
        self._profile_stream: int | None = None
        self._addresses: dict[str, int] = {}
        self._scratch: Span | None = None
        self._warm = self._captured = False

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT or size < self._engine.device_memory_size_v2:
            raise Fault(
                f"{size} bytes of scratch memory at {memory} do not serve {self._engine.name}"
            )
        self._scratch = Span(memory, self._engine.device_memory_size_v2)

    def set_optimization_profile_async(self, index: int, handle: int) -> bool:
        self._device.forbid_in_capture("choose an optimisation profile")
        if self._captured:
            raise Fault(
                f"{self._engine.name}: a graph was captured with the profile of this context, "
                "which now changes"
            )
        self._profile_stream = self._device.stream_of(handle).handle
        self._profile, self._shapes, self._warm = index, {}, False
        return 0 <= index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._captured:
            raise Fault(
                f"{self._engine.name}: a graph was captured with the shapes of this context, which "
                "now change"
            )
        if self._engine.refuses("set_input_shape", self._engine.logger):
            return False
        declared = self._engine.shapes[name]
        if len(declared) != len(shape) or any(
            d not in (None, s) for d, s in zip(declared, shape, strict=True)
        ):
            self._engine.logger.log(Severity.ERROR, f"{name} is {declared}, not {list(shape)}")
            return False
        if self._profile is None:
            raise Fault(
                f"{self._engine.name} has several profiles, and none was chosen before the shape "
                f"of {name}"
            )
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            said = f"{name} {list(shape)} lies outside of profile {self._profile}, {low} to {high}"
            self._engine.logger.log(Severity.ERROR, said)
            return False
        self._shapes[name], self._warm = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (
            self._shapes[name]
            if name in self._engine.inputs
            else self._engine.output_shapes(self._shapes)[name]
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % ALIGNMENT:
            raise Fault(
                f"{self._engine.name}: {name} lies at {memory}, which is no multiple of {ALIGNMENT}"
            )
        if name not in self._engine.dtypes:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, handle: int) -> bool:
        engine, stream = self._engine, self._device.stream_of(handle)
        if engine.refuses("execute_async_v3", engine.logger):
            return False
        if self._profile_stream not in (None, handle):
            raise Fault(f"{engine.name}: its profile was chosen on another stream than it runs on")
        engine.profiles_used.append(self._profile)
        missing = sorted(engine.dtypes.keys() - self._addresses.keys())
        if missing:
            raise Fault(f"{engine.name}: {missing[0]} has no address")
        if engine.device_memory_size_v2 and self._scratch is None:
            raise Fault(f"{engine.name} runs without scratch memory")
        if stream.graph is not None:
            self._captured = True
            if not self._warm:
                raise Fault(f"{engine.name} is captured before it ran once with these shapes")
        if not self._warm:
            self._compile()
        self._warm = True
        reads = {name: self._span(name) for name in engine.inputs}
        writes = {name: self._span(name) for name in engine.outputs}
        self._check_overlaps(reads, writes)
        engine.calls.append(
            (engine.name, {name: span.start for name, span in {**reads, **writes}.items()})
        )
        scratch, device, shapes = self._scratch, self._device, dict(self._shapes)

        def run() -> None:
            feeds = {
                name: device.bytes_at(span, name)
                .view(engine.dtypes[name])
                .reshape(shapes[name])
                .copy()
                for name, span in reads.items()
            }
            if scratch is not None:
                device.poison(scratch, "scratch memory")
            for name, values in engine.run(feeds).items():
                device.bytes_at(writes[name], name)[:] = (
                    np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                )

        stream.put(Work(engine.name, reads, writes, run))
        return True

    def _compile(self) -> None:
        kernels = f"{self._engine.digest} {sorted(self._shapes.items())}"
        if not self._cache or kernels not in self._cache.kernels:
            self._engine.compiled.append(kernels)
        if self._cache:
            self._cache.kernels.add(kernels)

    def _span(self, name: str) -> Span:
        shape = self.get_tensor_shape(name)
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(self._engine.dtypes[name]).itemsize
        return Span(self._addresses[name], nbytes)

    def _check_overlaps(self, reads: Mapping[str, Span], writes: Mapping[str, Span]) -> None:
        name, placed = self._engine.name, list(writes.items())
        for i, (one, span) in enumerate(placed):
            for other, earlier in placed[:i]:
                if span.overlaps(earlier):
                    raise Fault(f"{name} writes {one} and {other} to the same memory")
            for other, read in reads.items():
                if span.overlaps(read) and not (span == read and self._engine.elementwise):
                    raise Fault(f"{name} writes {one} over {other}, which it reads")
            if self._scratch is not None and span.overlaps(self._scratch):
                raise Fault(f"{name} writes {one} into scratch memory")
        for other, read in reads.items():
            if self._scratch is not None and read.overlaps(self._scratch):
                raise Fault(f"{name} reads {other} from scratch memory")
