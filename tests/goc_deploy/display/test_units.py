from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from goc_deploy.compiler import compile_for_device
from goc_deploy.display.units import stream_rows, unit_rows
from goc_deploy.engine_dir.reading import read_manifest
from tests.goc_deploy.compiler.test_streams import SD3_LIKE, partly, spec_of


def test_equal_blocks_are_one_row_for_each_branch(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    spec = manifest.model
    columns, rows = unit_rows(manifest)
    assert [row[:5] for row in rows] == [
        [f"0 to {spec.depth - 1}", branch, "image", "feature", "shift, scale"]
        for branch in ("attn", "mlp")
    ]
    weights = {graph.name: graph for graph in manifest.graphs}["block_00_attn"]
    end = max(map(weights.end, weights.parameters))
    assert rows[0][columns.index("weights MB")] == f"{end / 1e6:.2f}"
    features = 2 * spec.tokens * spec.hidden * 4
    assert rows[0][columns.index("features MB/image")] == f"{features / 1e6:.2f}"


def test_blocks_that_differ_are_listed_run_by_run(golden_engine: Path) -> None:
    spec = spec_of(SD3_LIKE)
    _, rows = unit_rows(replace(read_manifest(golden_engine), model=spec))
    assert [row[0] for row in rows] == ["0", "0", "1 to 2", "1 to 2", "3", "3"]
    assert rows[0][2:4] == ["image, text", "feature, feature_2, feature_text"]
    assert rows[-1][2:4] == ["image", "feature"]


def test_text_that_nothing_reads_is_counted(golden_engine: Path) -> None:
    spec = spec_of(SD3_LIKE)
    plan = compile_for_device(partly({2}, spec), spec)
    _, rows = stream_rows([plan], replace(read_manifest(golden_engine), model=spec), "text")
    # Units 0, 1, 3, 4 and 5 of the second step predict text; unit 2 reads that of the first two.
    assert rows == [["plan", "5", "2", str(2 * 5 * 3), "2"]]
