"""A TensorRT whose engines are ONNX graphs.

ONNX Runtime executes them at the addresses that a context was given.

It runs what the real parser would take: graphs with embedded weights or with weights as inputs, and
the plugin's stack. An engine file is the graph behind the first bytes of a real one. It keeps the
rules of the real library, and raises `tests.stand_ins.kernels.Fault` if the real one would
compute something wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import onnxruntime

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engines.ort import shared_pool_of_process
from goc_deploy.engines.plugin.stacking import STACK
from goc_deploy.engines.tensorrt import store
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.jobs import Job, graph_of_job
from goc_deploy.engines.tensorrt.library import Library, this_platform
from goc_deploy.options import EngineOptions, Progress
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.tensorrt_context import (
    ComputeCapability,
    Context,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    ILogger,
    RuntimeConfig,
    Severity,
    TensorIOMode,
)

SCRATCH_BYTES_PER_NODE = 96
PROFILES = "optimisation profiles"  # among the properties of the graph
_NAMES = {1: "FLOAT", 7: "INT64", 10: "HALF", 16: "BF16"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "HALF": np.float16}
_ELEMENTWISE = {"Add", "Mul", "Cast", "CastLike", "Split", "Reshape", "Identity"}


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on the thread pool of the process, as those of the product."""
    shared_pool_of_process(0)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads, options.log_severity_level = False, 3
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class Empty:
    """A base class of plugins, or a value of one."""

    def __init__(self, *_: Any) -> None: ...


class Engine:
    """See ``ICudaEngine``."""

    def __init__(
        self, tensorrt: StandInTensorrt, logger: Any, model: onnx.ModelProto, number: int
    ) -> None:
        self.device, self.calls, self.logger, self.is_rtx = (
            tensorrt.device,
            tensorrt.calls,
            logger,
            tensorrt.is_rtx,
        )
        self.refuses, self.contexts = tensorrt.refuses, tensorrt.contexts
        self.compiled, self.digest = (
            tensorrt.compiled,
            sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        )
        graph = model.graph
        held = {initializer.name for initializer in graph.initializer}
        inputs = [value for value in graph.input if value.name not in held]
        self.name = f"engine {number} ({graph.node[0].name or graph.node[0].op_type})"
        self.inputs, self.outputs = [v.name for v in inputs], [v.name for v in graph.output]
        types = {v.name: _NAMES[v.type.tensor_type.elem_type] for v in [*inputs, *graph.output]}
        self._types, self.dtypes = types, {name: _NUMPY[kind] for name, kind in types.items()}
        self.shapes = {
            v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in inputs
        }
        ops = {node.op_type for node in graph.node}
        self.elementwise = all(op in _ELEMENTWISE or op.startswith("GocCache") for op in ops)
        self.stack = graph.node[0] if ops == {STACK} else None
        self._session = None if self.stack else session_of(model)
        told = {entry.key: entry.value for entry in model.metadata_props}
        self._profiles = json.loads(told.get(PROFILES, "[{}]"))
        self.num_optimization_profiles, self.profiles_used = (
            len(self._profiles),
            tensorrt.profiles_used,
        )
        self._known_shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        self.device_memory_size_v2 = (
            0 if self.elementwise else SCRATCH_BYTES_PER_NODE * len(graph.node)
        )
        self.num_io_tensors = len(types)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self._types[name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if size is None else size for size in self.shapes[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        """Without profiles in the file, as tests write it, every size is in range."""
        known = self._profiles[index].get(name)
        shape = self.get_tensor_shape(name)
        low, usual, high = (tuple(size if s == -1 else s for s in shape) for size in (1, 1, 2**31))
        return [tuple(sizes) for sizes in known] if known else [low, usual, high]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | RuntimeConfig
    ) -> Context | None:
        if self.refuses("create_execution_context", self.logger):
            return None
        if not isinstance(how, RuntimeConfig):
            assert not self.is_rtx
            return self._known(Context(self, how))
        assert (
            how.dynamic_shapes_kernel_specialization_strategy
            is DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return self._known(Context(self, how.strategy, how.cache))

    def _known(self, context: Context) -> Context:
        self.contexts.add(context)
        return context

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Found by running on zeros, once for each set of input shapes."""
        key = tuple(sorted(shapes.items()))
        if key not in self._known_shapes:
            found = self.run(
                {name: np.zeros(shapes[name], self.dtypes[name]) for name in self.inputs}
            )
            self._known_shapes[key] = {name: values.shape for name, values in found.items()}
        return self._known_shapes[key]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            return self._run_stack(feeds)
        return dict(zip(self.outputs, self._session.run(self.outputs, feeds), strict=True))

    def _run_stack(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the plugin computes, in float32."""
        counts, stores = (
            [int(v) for v in a.ints]
            for a in self.stack.attribute
            if a.name in ("entries", "stores")
        )
        tensors = [feeds[name] for name in self.stack.input]
        x, gates, coefficients = (tensor.astype(np.float32) for tensor in tensors[:3])
        history, row, stored = iter(tensors[3:]), iter(coefficients), []
        for unit, count in enumerate(counts):
            whole, g = next(row), next(history).astype(np.float32)
            for _ in range(count - 1):
                g = g + next(row) * next(history).astype(np.float32)
            x = x + (whole * gates[unit])[:, None] * g
            stored += [g] if stores[unit] else []
        dtype = self.dtypes["x_out"]
        return {n: v.astype(dtype) for n, v in zip(self.stack.output, [x, *stored], strict=True)}


def with_profiles(graph: bytes, profiles: Sequence[Mapping[str, Any]]) -> bytes:
    """A graph that says which optimisation profiles its engine has."""
    model = onnx.load_model_from_string(graph)
    onnx.helper.set_model_props(model, {PROFILES: json.dumps(profiles)})
    return bytes(model.SerializeToString(deterministic=True))


class StandInTensorrt:
    """The module.

    ``calls`` lists every run in order, with the addresses of its tensors, ``compiled`` what RTX
    compiled; ``loaded`` counts engines, and ``contexts`` are those that are alive.
    """

    ILogger, TensorIOMode = ILogger, TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    IPluginV3 = type("IPluginV3", (Empty,), {})
    IPluginV3OneCore = type("IPluginV3OneCore", (Empty,), {})
    IPluginV3OneBuild = type("IPluginV3OneBuild", (Empty,), {})
    IPluginV3OneRuntime = type("IPluginV3OneRuntime", (Empty,), {})
    IPluginCreatorV3One = type("IPluginCreatorV3One", (Empty,), {})
    PluginField = PluginFieldCollection = Empty
    PluginFieldType = SimpleNamespace(INT32=0)
    DataType = SimpleNamespace(FLOAT=0, HALF=1, BF16=2)
    __version__ = "99.1"

    def __init__(
        self, device: StandInDevice, backend: str = "tensorrt-rtx", kernels: int | None = 1
    ) -> None:
        self.kernels = kernels  # that the builder says an engine has
        self.device, self.backend, self.is_rtx = device, backend, backend == "tensorrt-rtx"
        self.__name__ = f"stand_in_{id(self)}"
        self.calls: list[tuple[str, dict[str, int]]] = []
        self.compiled: list[str] = []
        self.profiles_used: list[int | None] = []
        self.registered: list[str] = []
        self.failures: dict[str, list[tuple[Severity, str]]] = {}
        self.loaded = 0
        self.contexts: WeakSet[Context] = WeakSet()
        if self.is_rtx:
            self.ComputeCapability = ComputeCapability
            self.DynamicShapesKernelSpecializationStrategy = (
                DynamicShapesKernelSpecializationStrategy
            )

    def refuses(self, call: str, logger: Any) -> bool:
        """Whether a test lets a call fail, which then logs what the test says."""
        for severity, text in self.failures.get(call, ()):
            logger.log(severity, text)
        return call in self.failures

    @property
    def library(self) -> Library:
        return Library(self.backend, self)

    def get_plugin_registry(self) -> SimpleNamespace:
        return SimpleNamespace(
            register_creator=lambda creator, _space: not self.registered.append(creator.name)
        )

    def Runtime(self, logger: Any) -> SimpleNamespace:
        def deserialize_cuda_engine(content: memoryview) -> Engine | None:
            self.device.forbid_in_capture("load an engine")
            if self.refuses("deserialize_cuda_engine", logger):
                return None
            model = onnx.load_model_from_string(bytes(content).removeprefix(self._magic))
            if (
                any(node.op_type == STACK for node in model.graph.node)
                and STACK not in self.registered
            ):
                logger.log(Severity.ERROR, f"plugin {STACK} is not registered")
                return None
            self.loaded += 1
            return Engine(self, logger, model, self.loaded)

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)

    @property
    def _magic(self) -> bytes:
        return store.MAGIC.get(self.backend, b"")

    def build_engines(
        self, directory: EngineDir, options: EngineOptions, progress: Progress
    ) -> tuple[EngineDir, int]:
        """`goc_deploy.engines.tensorrt.store.build_engines` without the real builder."""
        target = Target(options.backend, self.__version__, this_platform(), options.capabilities)
        builder = nullcontext(self)
        return store.build_missing(directory, target, options, progress, lambda _: builder)

    def build(self, directory: EngineDir, job: Job) -> tuple[Job, bytes, BuildReport]:
        """See `goc_deploy.engines.tensorrt.store.EngineBuilder`."""
        engine = self._magic + with_profiles(graph_of_job(directory, job), job.profiles)
        report = BuildReport(
            kernels=self.kernels,
            plugin_layers=int(job.recipe.plugin_sha256 is not None),
            scratch_bytes=4096,
        )
        return job, engine, report
