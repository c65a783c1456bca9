"""Engines that are copied from a directory with other weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.caches import keep_cache
from goc_deploy.engines.tensorrt.jobs import wanted_engines
from goc_deploy.engines.tensorrt.reuse import check_source, copy_engines
from goc_deploy.engines.tensorrt.store import add_engine, is_there, read_engine
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.options import EngineOptions, ExportOptions, no_progress
from tests.conftest import GOLDEN, Command
from tests.exporters.lora.files import saved

TARGET = Target("tensorrt-rtx", "1.7", "linux-x86_64", ("8.9",))
SHARED = EngineOptions(weight_mode="shared", scratch_limit_bytes=2**30)
CACHE = f"{TARGET.folder}/kernels-NVIDIA-L40S-cuda13.cache"
OPTIONS = ("--num-heads", 4, "--plan", "none", "--steps", 2)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The golden model without engines."""
    path = tmp_path_factory.mktemp("bare") / "engine"
    command("goc-export", GOLDEN / "model.pt", "-o", path, *OPTIONS)
    return path


@pytest.fixture
def directory(bare: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bare, tmp_path / "engine"))


@pytest.fixture(scope="module")
def built(bare: Path) -> Path:
    """The same with files in place of engines, and a cache."""
    path = Path(shutil.copytree(bare, bare.with_name("built")))
    for number, job in enumerate(wanted_engines(EngineDir.open(path), TARGET, SHARED)):
        content = b"vtrt engine %d" % number
        add_engine(EngineDir.open(path), job, content, BuildReport(kernels=number))
    keep_cache(path, CACHE, b"kernels")
    return path


@pytest.fixture
def source(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "source"))


def change(directory: Path, **fields: Any) -> None:
    manifest = replace(EngineDir.open(directory).manifest, **fields)
    (directory / MANIFEST_NAME).write_text(manifest_to_json(manifest))


def test_every_engine_and_cache_is_copied(directory: Path, source: Path) -> None:
    copied, count = copy_engines(directory, EngineDir.open(source), no_progress)
    there = EngineDir.open(source).manifest.engines
    assert count == len(there) > 0
    assert set(copied.manifest.engines) == set(there)
    for entry in there:
        assert read_engine(copied, entry) == read_engine(EngineDir.open(source), entry)
    assert bytes(copied.read(CACHE)) == b"kernels"
    assert all(is_there(copied, job) for job in wanted_engines(copied, TARGET, SHARED))


def test_engines_that_were_built_without_the_plugin_are_copied(
    directory: Path, source: Path
) -> None:
    change(source, engines=())
    opened = EngineDir.open(source)
    for job in wanted_engines(opened, TARGET, replace(SHARED, plugin=False)):
        add_engine(opened, job, b"vtrt", BuildReport())
    there = EngineDir.open(source)
    assert copy_engines(directory, there, no_progress)[1] == len(there.manifest.engines)


@pytest.mark.parametrize(
    ("of", "fields", "reason"),
    [
        ("directory", {"max_batch": 3}, "max_batch: 3, there 16"),
        ("source", {"engines": 3}, "there is none for .* and [0-9]+ more"),
    ],
)
def test_a_directory_with_other_graphs_or_sizes_is_refused_whole(
    of: str, fields: dict[str, Any], reason: str, directory: Path, source: Path
) -> None:
    path = {"directory": directory, "source": source}[of]
    if "engines" in fields:
        fields = {"engines": EngineDir.open(path).manifest.engines[: fields["engines"]]}
    change(path, **fields)
    before = (directory / MANIFEST_NAME).read_bytes()
    with pytest.raises(UsageError, match=reason):
        copy_engines(directory, EngineDir.open(source), no_progress)
    assert (directory / MANIFEST_NAME).read_bytes() == before


def test_a_damaged_engine_is_refused(directory: Path, source: Path) -> None:
    entry = EngineDir.open(source).manifest.engines[0]
    (source / entry.path).write_bytes(b"vtrt something else")
    with pytest.raises(EngineDirError, match=entry.path):
        copy_engines(directory, EngineDir.open(source), no_progress)


def test_what_can_be_known_before_the_export_is_refused_before_it(
    directory: Path, source: Path
) -> None:
    opened = EngineDir.open(source)
    check_source(opened, directory, ExportOptions())
    for options, reason in (
        (ExportOptions(precision="fp16"), "`precision=fp32` .* the export has `precision=fp16`"),
        (ExportOptions(max_batch=2), "`max_batch=16`, and .* `max_batch=2`"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_source(opened, directory, options)
    with pytest.raises(UsageError, match="is the output itself"):
        check_source(opened, source, ExportOptions())
    with pytest.raises(UsageError, match="has no TensorRT engines with shared weights"):
        check_source(EngineDir.open(directory), source, ExportOptions())


def test_goc_export_copies_engines_and_nothing_is_left_to_build(
    tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")
    flags = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")
    shared = ("--engine-weights", "shared")
    model, first, second = GOLDEN / "model.pt", tmp_path / "first", tmp_path / "second"
    command("goc-export", model, "-o", first, *OPTIONS, *flags, *shared)
    outputs, inputs = torch.load(model)["blocks.0.attn.qkv.weight"].shape
    shapes = {"A": (2, inputs), "B": (outputs, 2)}
    matrices = {
        f"blocks.0.attn.qkv.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()
    }
    lora = saved(matrices, tmp_path / "lora.safetensors")
    words = ("--lora", f"{lora}:0.5", "--reuse-engines", first)
    done = command("goc-export", model, "-o", second, *OPTIONS, *words, *flags, *shared)
    assert ": 0 engines built for tensorrt-rtx" in done.stderr
    digests = [
        {entry.key: opened.sha256(entry.path) for entry in opened.manifest.engines}
        for opened in map(EngineDir.open, (first, second))
    ]
    assert digests[0] == digests[1]
    assert digests[0]
