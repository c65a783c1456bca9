"""The plugin's classes, driven as TensorRT drives them, on host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from goc_deploy.engines.plugin.kernel import Stack
from goc_deploy.engines.plugin.registration import plugin_creators, register_plugin
from tests.engines.plugin.arrays import assert_close, random_case, tensor
from tests.engines.plugin.conftest import HostKernels

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
TYPES = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16}


def description(shape: tuple[int, ...], dtype: str) -> Any:
    found = trt.PluginTensorDesc()
    found.dims, found.type, found.format = trt.Dims(shape), TYPES[dtype], trt.TensorFormat.LINEAR
    return found


def plugin_from(creators: list[Any], name: str, stack: Stack) -> Any:
    creator = next(c for c in creators if c.name == name)
    fields = (
        [("entries", stack.entries), ("stores", stack.stores)] if name == "GocCacheStack" else []
    )
    arrays = [(field, np.array(values, np.int32)) for field, values in fields]
    collection = trt.PluginFieldCollection(
        [trt.PluginField(n, a, trt.PluginFieldType.INT32) for n, a in arrays]
    )
    return creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)


CASES = {
    "GocCacheUpdate2": Stack((2,), (True,)),
    "GocCacheApply1": Stack((1,), (False,)),
    "GocCacheUpdate4": Stack((4,), (True,)),
    "GocCacheStack": Stack((1, 2, 3, 2), (False, True, True, False)),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_enqueue_computes_what_numpy_does(name: str, dtype: str, host_kernels: HostKernels) -> None:
    stack, shape = CASES[name], (2, 6, 24)
    plugin = plugin_from(plugin_creators(trt, lambda: host_kernels), name, stack)
    attached = plugin.attach_to_context(None).clone()
    case = random_case(stack, shape, dtype, 1)
    outputs = [tensor(np.zeros(shape), dtype) for _ in range(attached.num_outputs)]
    described = [
        description(a.shape, "float32" if i == 2 else dtype) for i, a in enumerate(case.inputs)
    ]
    attached.enqueue(
        described,
        [description(shape, dtype)] * len(outputs),
        [a.ctypes.data for a in case.inputs],
        [a.ctypes.data for a in outputs],
        0,
        0,
    )
    for found, expected in zip(outputs, [case.x_out, *case.stored], strict=True):
        assert_close(found, expected, dtype, 20)


def test_a_plugin_says_what_it_takes_and_survives_serialisation(host_kernels: HostKernels) -> None:
    creators = plugin_creators(trt, lambda: host_kernels)
    plugin = plugin_from(creators, "GocCacheStack", CASES["GocCacheStack"])
    fields = {field.name: list(field.data) for field in plugin.get_fields_to_serialize()}
    assert fields == {"entries": [1, 2, 3, 2], "stores": [0, 1, 1, 0]}
    again = next(c for c in creators if c.name == "GocCacheStack").create_plugin(
        "GocCacheStack", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME
    )
    assert again.stack == plugin.stack
    assert again.num_outputs == 3
    assert plugin.get_output_data_types([trt.DataType.BF16]) == [trt.DataType.BF16] * 3
    assert plugin.get_workspace_size([], []) == 0
    assert plugin.get_valid_tactics() == []

    def supported(dtypes: list[str], position: int) -> bool:
        tensors = []
        for dtype in dtypes:
            dynamic = trt.DynamicPluginTensorDesc()
            dynamic.desc = description((1, 2, 8), dtype)
            tensors.append(dynamic)
        return bool(plugin.supports_format_combination(position, tensors, len(tensors)))

    assert all(supported(["float16", "float16", "float32", "float16"], i) for i in range(4))
    assert not supported(["float16", "float16", "float16"], 2)
    assert not supported(["float16", "float32"], 1)


def test_the_plugin_is_registered_once_per_process() -> None:
    register_plugin(trt)
    register_plugin(trt)
    registry = trt.get_plugin_registry()
    names = [creator.name for creator in registry.all_creators if creator.plugin_namespace == "goc"]
    assert sorted(names) == sorted(
        [
            "GocCacheStack",
            *(f"GocCache{kind}{n}" for kind in ("Apply", "Update") for n in range(1, 5)),
        ]
    )
    assert all(registry.get_creator(name, "1", "goc") is not None for name in names)
