"""The plugin as TensorRT sees it: IPluginV3 classes on the kernel, and their registration.

``GocCacheUpdateN`` and ``GocCacheApplyN`` have the signature of the function bodies in the ONNX
files and serve one unit; ``GocCacheStack`` serves a whole chain. A plan names the plugin (name,
version, namespace, fields) and does not hold it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from goc_deploy.compiler.cache_ops import CACHE_DOMAIN, PLUGIN_VERSION, update_name
from goc_deploy.engines.plugin.kernel import (
    MAX_ENTRIES,
    Kernels,
    Stack,
    device_kernels,
    geometry,
    parameters_from_addresses,
)
from goc_deploy.engines.plugin.stacking import STACK
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES

_registered: dict[str, list[Any]] = {}  # module name -> creators, which TensorRT does not own
_lock = threading.Lock()


def register_plugin(trt: Any, kernels: Callable[[], Kernels] = device_kernels) -> None:
    """Register the plugin with a TensorRT, once per process.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        kernels: returns the kernels when a plugin is attached to an execution context.

    Raises:
        EnvironmentUnsupportedError: the registry refuses the plugin.
    """
    with _lock:
        if trt.__name__ in _registered:
            return
        make = plugin_creators(trt, kernels)
        registry = trt.get_plugin_registry()
        for creator in make:
            if not registry.register_creator(creator, CACHE_DOMAIN):
                raise EnvironmentUnsupportedError(
                    f"{trt.__name__} {trt.__version__} does not register plugin {creator.name}; "
                    "build with `EngineOptions.plugin=False`"
                )
        _registered[trt.__name__] = make


def plugin_creators(trt: Any, kernels: Callable[[], Kernels]) -> list[Any]:
    """Make a creator for each op type."""
    plugin_class = _plugin_class(trt, kernels)

    # mypy: the base class exists only after the library is imported.
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates plugins of one name; ``fixed`` is their stack; with None the fields define it."""

        def __init__(self, name: str, fixed: Stack | None) -> None:
            super().__init__()
            self.name, self.plugin_namespace, self.plugin_version = (
                name,
                CACHE_DOMAIN,
                PLUGIN_VERSION,
            )
            self.fixed = fixed
            self.field_names = _int_fields(trt, {} if fixed else {"entries": (), "stores": ()})

        def create_plugin(self, _name: str, fields: Any, _phase: Any) -> Any:
            if self.fixed:
                return plugin_class(self.name, self.fixed)
            lists = {field.name: [int(value) for value in field.data] for field in fields}
            stack = Stack(tuple(lists["entries"]), tuple(value != 0 for value in lists["stores"]))
            return plugin_class(self.name, stack)

    creators = [
        Creator(update_name(entries, stores=stores), Stack((entries,), (stores,)))
        for stores in (True, False)
        for entries in range(1, MAX_ENTRIES + 1)
    ]
    return [*creators, Creator(STACK, None)]


def _int_fields(trt: Any, values: Mapping[str, Sequence[int]]) -> Any:
    return trt.PluginFieldCollection(
        [
            trt.PluginField(name, np.array(value, np.int32), trt.PluginFieldType.INT32)
            for name, value in values.items()
        ]
    )


class _OneTactic:
    """What TensorRT asks of a plugin that has one way to run and needs no scratch memory."""

    def get_capability_interface(self, _kind: Any) -> Any:
        return self

    def configure_plugin(self, _inputs: Any, _outputs: Any) -> None:
        pass

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, _tactic: int) -> None:
        pass

    def get_workspace_size(self, _inputs: Any, _outputs: Any) -> int:
        return 0


class _StackBehavior(_OneTactic):
    """A stack as a plugin, without the classes of a TensorRT, which exist when it is imported.

    Inputs: x (B, T, D), gates, coefficients, histories. Outputs: x_out, what is stored.
    """

    trt: Any
    kernels: Callable[[], Kernels]
    dtypes: Mapping[Any, str]

    def __init__(self, name: str, stack: Stack, loaded: Kernels | None = None) -> None:
        for base in _interfaces(self.trt):
            base.__init__(self)
        self.plugin_name, self.plugin_namespace = name, CACHE_DOMAIN
        self.plugin_version = PLUGIN_VERSION
        self.num_outputs = 1 + sum(stack.stores)
        self.stack, self.loaded = stack, loaded

    def clone(self) -> Any:
        return type(self)(self.plugin_name, self.stack, self.loaded)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]] * self.num_outputs

    def get_output_shapes(
        self, inputs: Sequence[Any], _shape_inputs: Any, _builder: Any
    ) -> list[Any]:
        return [self.trt.DimsExprs(inputs[0])] * self.num_outputs

    def supports_format_combination(
        self, position: int, tensors: Sequence[Any], _inputs: int
    ) -> bool:
        tensor, trt = tensors[position].desc, self.trt
        coefficients = position == 2
        fits = (
            tensor.type == trt.DataType.FLOAT
            if coefficients
            else tensor.type == tensors[0].desc.type
        )
        linear = tensor.format == trt.TensorFormat.LINEAR
        return bool(fits and tensor.type in self.dtypes and linear)

    def on_shape_change(self, _inputs: Any, _outputs: Any) -> None:
        """Accept; a builder that times the plugin also calls this, without a context."""
        self.loaded = self.loaded or self.kernels()

    def get_fields_to_serialize(self) -> Any:
        values = {"entries": self.stack.entries, "stores": self.stack.stores}
        return _int_fields(self.trt, values if self.plugin_name == STACK else {})

    def attach_to_context(self, _context: Any) -> Any:
        """Copy for an execution context; the copy loads the kernels that `enqueue` needs."""
        return type(self)(self.plugin_name, self.stack, self.loaded or self.kernels())

    def enqueue(
        self,
        input_desc: Sequence[Any],
        _output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        _workspace: int,
        stream: int,
    ) -> None:
        """Launch once; this neither waits nor allocates, so a CUDA graph can capture it."""
        assert self.loaded is not None, "enqueue comes after on_shape_change"
        x = input_desc[0]
        shape = tuple(x.dims)
        launch_geometry = geometry(shape, self.dtypes[x.type], inputs, outputs)
        parameters = parameters_from_addresses(self.stack, shape, inputs, outputs)
        self.loaded.launch(launch_geometry, parameters, stream)


def _interfaces(trt: Any) -> tuple[Any, ...]:
    return (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )


def _plugin_class(trt: Any, kernels: Callable[[], Kernels]) -> Any:
    dtypes = {
        getattr(trt.DataType, ELEMENT_TYPES[dtype].tensorrt): dtype
        for dtype in DTYPE_OF_PRECISION.values()
    }
    attributes = {"trt": trt, "kernels": staticmethod(kernels), "dtypes": dtypes}
    return type("StackPlugin", (_StackBehavior, *_interfaces(trt)), attributes)
