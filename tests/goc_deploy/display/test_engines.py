from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import goc_deploy
from goc_deploy.display.engines import (
    engine_rows,
    graph_rows,
    launch_rows,
    launched_graphs,
    target_folders,
)
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import EngineEntry, FileEntry, Manifest
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.trace import Span
from tests.conftest import GOLDEN_PLANS

TARGET = Target("tensorrt-rtx", "1.7", "linux-x86_64", ("8.6",))


def with_engines(manifest: Manifest, weights: str, kernels: int | None) -> Manifest:
    """Pretend that every graph has an engine of so many kernels."""
    paths = [unit.onnx for unit in manifest.all_graphs()]
    engines = tuple(
        EngineEntry(
            f"{TARGET.folder}/{weights}{i}.engine",
            "k",
            TARGET,
            weights,
            (path,),
            kernels,
            0,
            1_500_000,
            0,
            ("B=2", "B=4"),
        )
        for i, path in enumerate(paths)
    )
    files = tuple(FileEntry(engine.path, 2_500_000, "0" * 64) for engine in engines)
    return replace(manifest, engines=(*manifest.engines, *engines), files=(*manifest.files, *files))


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_what_a_step_is_said_to_launch_is_what_it_launches(golden_engine: Path, spec: str) -> None:
    spans: list[Span] = []
    with goc_deploy.load(golden_engine, plan=spec) as pipe:
        pipe.generate([1], spans=spans)
        plan, manifest = pipe.plan, pipe.manifest
    ran: list[list[str]] = [[]]
    for span in spans:
        if span.category == "launch" and span.name != "conditioning":
            ran[-1].append("predict" if span.name.startswith("predict") else span.name)
        elif span.category == "step":
            ran.append([])
    for step in range(plan.steps):
        said = [Path(path).stem for path in launched_graphs(plan, manifest, step)]
        names = ["predict" if name.startswith("predict") else name for name in said]
        assert sorted(names) == sorted(ran[step])


def test_kernels_of_a_step_are_those_of_its_graphs(golden_engine: Path) -> None:
    manifest = with_engines(
        with_engines(read_manifest(golden_engine), "embedded", 3), "shared", None
    )
    with goc_deploy.load(golden_engine, plan="fora:2") as pipe:
        columns, rows = launch_rows([pipe.plan], manifest)
    assert columns[-2:] == [
        f"tensorrt-rtx-1.7-sm86 {way}: kernels" for way in ("embedded", "shared")
    ]
    for row in rows:
        assert int(row[5]) == 3 * int(row[4])
        assert row[6] == f"{row[4]} graphs unknown"
    assert [[*row[:3], row[4]] for row in rows] == [
        ["fora-2", "collapsed", "10", "5"],
        ["fora-2", "full", "10", "5"],
    ]


def test_engines_are_shown_with_their_size_and_whether_their_file_is_there(
    golden_engine: Path,
) -> None:
    manifest = with_engines(read_manifest(golden_engine), "embedded", None)
    directory = EngineDir(golden_engine, manifest)
    assert target_folders(manifest) == [TARGET.folder]
    _, rows = engine_rows(directory, TARGET.folder)
    assert rows[0] == [
        "embedded0.engine",
        "embedded",
        "1",
        "2.50",
        "?",
        "0",
        "B=2 | B=4",
        "1.5",
        "missing",
    ]
    _, units = graph_rows(directory)
    assert {row[-1] for row in units} == {"1"}
    assert any(row[0].startswith("predict 1*") for row in units)
    assert {"segment -*8", "segment w*8"} <= {row[0] for row in units}
