from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goc_deploy.compiler.cache_ops import updates_from_signature
from goc_deploy.engines.plugin.kernel import MAX_UNITS
from goc_deploy.engines.plugin.stacking import STORES_THAT_FUSE, stack_updates
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.exporters.graphs.step import collect_graph
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.booleans()), min_size=1, max_size=6)
)
def test_a_stack_takes_and_gives_what_the_chain_did(runs: list[tuple[int, int, bool]]) -> None:
    signature = " ".join(
        [f"{k}{'w' if w else ''}*{n}" for k, n, w in runs] + [f"2w*{STORES_THAT_FUSE + 1}"]
    )
    units = updates_from_signature(signature)
    model = predict_graph(signature, SPEC, "fp16")
    before = [v.name for v in [*model.graph.input, *model.graph.output]]
    assert stack_updates(model) == len(units)
    assert [v.name for v in [*model.graph.input, *model.graph.output]] == before
    (node,) = model.graph.node
    assert [*node.input, *node.output] == before
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["entries"] == [k for k, _ in units]
    assert attributes["stores"] == [int(w) for _, w in units]
    assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"goc", b"1")
    assert not model.functions


@pytest.mark.parametrize(
    "signature", ["1*56", f"2w*{STORES_THAT_FUSE}", "4*28", f"2w*{MAX_UNITS + 1}"]
)
def test_chains_that_tensorrt_fuses_or_that_no_launch_holds_stay_as_they_are(
    signature: str,
) -> None:
    model = predict_graph(signature, SPEC, "fp16")
    before = model.SerializeToString()
    assert stack_updates(model) == 0
    assert model.SerializeToString() == before


def test_other_graphs_stay_as_they_are() -> None:
    model = collect_graph(SPEC, "fp32")
    assert stack_updates(model) == 0
    model = predict_graph("2w*9", SPEC, "fp32")
    model.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["y"]))
    assert stack_updates(model) == 0
