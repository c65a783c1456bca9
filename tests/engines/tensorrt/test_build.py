from __future__ import annotations

import os
import subprocess
import sys

import pytest

from goc_deploy.engines.plugin.stacking import stack_updates
from goc_deploy.engines.tensorrt.build import BuildReport, BuildRequest
from goc_deploy.engines.tensorrt.process import build_process
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.exporters.graphs.step import collect_graph
from goc_deploy.spec import ModelSpec

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
SHAPES = dict.fromkeys(("x", "accumulated"), ((1, 4, 8), (2, 4, 8), (2, 4, 8)))


def test_one_process_builds_one_graph_after_the_other_and_says_why_not() -> None:
    with build_process("tensorrt-rtx", plugin=False) as process:
        graph = collect_graph(SPEC, "bf16").SerializeToString()
        built = process.build(graph, BuildRequest([SHAPES], ["8.6"], 0))
        assert built.engine[:4] == b"vtrt"
        assert built.report == BuildReport(kernels=1, plugin_layers=0, scratch_bytes=0)
        assert built.timings == b""  # it times nothing
        built = process.build(graph, BuildRequest([SHAPES], ["7.5"], 0))
        assert built.engine == b""
        assert "HW-specific datatypes: b16" in built.report.refusal
        built = process.build(b"no graph", BuildRequest([SHAPES], ["8.6"], 0))
        assert built.engine == b""
        assert built.report.refusal
        built = process.build(graph, BuildRequest([{}], ["x"], 0))
        assert "ValueError" in built.report.refusal
        assert process.build(graph, BuildRequest([SHAPES], ["8.6"], 2**20)).report.refusal == ""


@pytest.mark.parametrize("plugin", [True, False])
def test_a_second_profile_is_built_and_its_kernels_are_not_counted_twice(plugin: bool) -> None:
    def profiles(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, list[tuple[int, ...]]]]:
        sizes = [(1, usual, 8) for usual in (2, 8)]
        return [
            {
                name: [tuple(s or size for s in shape) for size in way]
                for name, shape in shapes.items()
            }
            for way in sizes
        ]

    stack = predict_graph("1*1 2w*12", SPEC, "fp16")
    if plugin:
        stack_updates(stack)
    graphs = [collect_graph(SPEC, "fp16"), stack]
    with build_process("tensorrt-rtx", plugin=plugin) as process:
        for graph in graphs:
            shapes = {
                value.name: tuple(
                    dimension.dim_value for dimension in value.type.tensor_type.shape.dim
                )
                for value in graph.graph.input
                if any(dimension.dim_param for dimension in value.type.tensor_type.shape.dim)
            }
            content = graph.SerializeToString()
            reports = []
            for ways in (profiles(shapes), profiles(shapes)[1:]):
                built = process.build(content, BuildRequest(ways, ["8.6"], 0))
                assert not built.report.refusal
                assert built.engine[:4] == b"vtrt"
                reports.append(built.report)
            assert reports[0] == reports[1]
            assert reports[0].kernels
            assert reports[0].plugin_layers == (plugin and graph is stack)


CONFIGURE = """
import tensorrt_rtx as trt
from goc_deploy.engines.tensorrt.build import BuildRequest, config_from_request
from goc_deploy.engines.tensorrt.library import library_from_backend
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
library, network = library_from_backend("tensorrt-rtx"), builder.create_network(0)
c = config_from_request(library, builder, network, BuildRequest([{}], ["8.6", "12.0"], 2**26))
targets = [c.get_compute_capability(i).name for i in range(c.num_compute_capabilities)]
workspace = c.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
print(c.max_aux_streams, c.get_flag(trt.BuilderFlag.TF32), workspace, *targets)
"""


def test_the_configuration_is_one_stream_no_tf32_and_what_was_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert done.stdout.splitlines()[-1] == f"0 False {2**26} SM86 SM120", done.stderr
