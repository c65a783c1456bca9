"""A module of the name ``tensorrt`` whose builder times tactics as the real one does.

The process that builds engines imports it.

Its folder is put on the search path, so Polygraphy and the build process import it by its name. It
times a layer once for each optimum, unless the timing cache has it; an engine is a JSON text with
the number of layers that were timed, and their shapes. The environment names the GPUs of the
machine, those that the process may see, and whether there is any memory left.
"""

from __future__ import annotations

import json
import os
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import onnx

__version__ = "99.2"


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = _Severity

    def log(self, severity: _Severity, text: str) -> None: ...


class IPluginV3: ...


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    TF32 = 7


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


def _header() -> str:
    first = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    return f"timings of {__version__} on {os.environ['STAND_IN_GPU'].split(',')[first]}"


class ITimingCache:
    """What was timed, as lines behind a header of version and GPU."""

    def __init__(self, header: str, timed: set[str]) -> None:
        self._header, self.timed = header, timed

    def combine(self, other: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = self._header == other._header or ignore_mismatch
        self.timed |= other.timed if fits else set()
        return fits

    def serialize(self) -> bytes:
        return "\n".join([self._header, *sorted(self.timed)]).encode()


class IBuilderConfig:
    max_aux_streams = 4
    profiling_verbosity: ProfilingVerbosity

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self.flags = {BuilderFlag.TF32}

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> ITimingCache | None:
        header, *timed = bytes(content or _header().encode()).decode().splitlines()
        return ITimingCache(header, set(timed)) if header.startswith("timings") else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.shapes[name] = (tuple(low), tuple(usual), tuple(high))

    def __bool__(self) -> bool:
        return True


class Network:
    """The graph that the parser read; inputs as Polygraphy asks for them."""

    model: onnx.ModelProto
    inputs: list[SimpleNamespace]

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> SimpleNamespace:
        return self.inputs[index]

    def __iter__(self) -> Any:
        return iter(())


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, _logger: ILogger) -> None:
        self._network = network

    def parse(self, content: bytes) -> bool:
        model = self._network.model = onnx.load_model_from_string(content)
        held = {initializer.name for initializer in model.graph.initializer}
        self._network.inputs = [
            SimpleNamespace(
                name=value.name,
                shape=tuple(
                    d.dim_value if not d.dim_param else -1 for d in value.type.tensor_type.shape.dim
                ),
                is_shape_tensor=False,
                dtype=None,
            )
            for value in model.graph.input
            if value.name not in held
        ]
        return True


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, _flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Network, config: IBuilderConfig) -> bytes | None:
        if os.environ.get("STAND_IN_OUT_OF_MEMORY"):
            error = (
                "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
            )
            self._logger.log(_Severity.ERROR, error)
            return None
        assert config.max_aux_streams == 0
        assert BuilderFlag.TF32 not in config.flags
        cache, timed = config.get_timing_cache(), 0
        assert cache is not None
        for profile in config.profiles:
            optima = sorted((name, usual) for name, (_, usual, _) in profile.shapes.items())
            for node in network.model.graph.node:
                layer = f"{node.op_type} {len(node.input)} {optima}"
                timed += layer not in cache.timed
                cache.timed.add(layer)
        self._logger.log(_Severity.INFO, "Total Activation Memory: 4096 bytes")
        shapes = [profile.shapes for profile in config.profiles]
        return json.dumps({"timed": timed, "profiles": shapes}).encode()
