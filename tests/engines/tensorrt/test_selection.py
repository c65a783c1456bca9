"""Which engines of a directory are loaded, and what is built because it lacks.

The stand-in is the builder.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.tensorrt.selection import best_selection, tensorrt_backend
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.options import EngineOptions, Progress, no_progress
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import CAPABILITY, copy_with_engines
from tests.stand_ins.tensorrt import StandInTensorrt

SHARED = EngineOptions(capabilities=(CAPABILITY,), weight_mode="shared")


@pytest.fixture(scope="module")
def with_shared(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_engines(golden_engine, tmp_path_factory.mktemp("select") / "engine", "shared")


@pytest.fixture
def engine(with_shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_shared, tmp_path / "engine"))


class Builder:
    """The stand-in's builder, which remembers what it was asked for and how many it built."""

    def __init__(self, tensorrt: StandInTensorrt) -> None:
        self.tensorrt, self.asked = tensorrt, []

    def __call__(self, directory: EngineDir, options: EngineOptions, progress: Progress):
        directory, built = self.tensorrt.build_engines(directory, options, progress)
        self.asked.append((options.weight_mode, options.capabilities, built))
        return directory, built


def asked(directory: Path, capability: str = CAPABILITY, version: str = "99.1") -> list[tuple]:
    """Make the backend; what the builder was asked for."""
    tensorrt = StandInTensorrt(StandInDevice())
    tensorrt.__version__ = version
    build = Builder(tensorrt)
    opened = EngineDir.open(directory)
    tensorrt_backend(opened, tensorrt.library, capability, tensorrt.device, build=build)
    return build.asked


def test_engines_that_are_there_are_loaded_and_none_is_built(engine: Path) -> None:
    assert asked(engine) == []


def test_engines_of_another_gpu_or_version_are_not_loaded(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {entry.path for entry in read_manifest(engine).engines}
    ((weights, capabilities, built),) = asked(engine, capability="12.0")
    assert (weights, capabilities) == ("embedded", ("12.0",))
    assert "have no tensorrt-rtx engine for this GPU, so they are built now, once" in caplog.text
    ((_, _, again),) = asked(engine, version="99.2")
    assert built == again > 0
    assert before < {entry.path for entry in read_manifest(engine).engines}


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [
        (
            "9.0",
            "fp32",
            r"tensorrt-rtx 99.1 has no target 9.0, only 7.5, .*; use `backend=tensorrt`, or "
            r"onnxruntime-cuda",
        ),
        (
            "7.5",
            "bf16",
            r"a GPU of compute capability 7.5 has no bf16; export with `precision=fp16`",
        ),
    ],
)
def test_a_gpu_without_a_target_is_refused_before_anything_is_built(
    engine: Path, capability: str, precision: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = replace(read_manifest(engine), precision=precision)
    (engine / MANIFEST_NAME).write_text(manifest_to_json(manifest))
    with pytest.raises(EnvironmentUnsupportedError, match=message):
        asked(engine, capability)
    assert not caplog.text


def test_an_engine_for_several_gpus_runs_on_each(golden_engine: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    options = EngineOptions(capabilities=("8.6", "8.9", "12.0"), weight_mode="shared")
    StandInTensorrt(StandInDevice()).build_engines(EngineDir.open(directory), options, no_progress)
    assert [asked(directory, capability) for capability in options.capabilities] == [[], [], []]


def test_damaged_and_unlisted_engines_are_built_again_and_no_other(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(engine)
    damaged, dropped = (engine / entry.path for entry in manifest.engines[:2])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    changed = replace(manifest, engines=(manifest.engines[0], *manifest.engines[2:]))
    (engine / MANIFEST_NAME).write_text(manifest_to_json(changed))
    assert asked(engine) == [("shared", (CAPABILITY,), 2)]
    assert "an engine is not loaded: " in caplog.text
    assert asked(engine) == []
    assert dropped.exists()


def test_a_key_of_another_recipe_is_not_trusted(engine: Path) -> None:
    manifest = read_manifest(engine)
    first, *others = manifest.engines
    changed = replace(manifest, engines=(replace(first, key="0" * 32), *others))
    (engine / MANIFEST_NAME).write_text(manifest_to_json(changed))
    assert asked(engine) == [("shared", (CAPABILITY,), 1)]


@pytest.mark.parametrize(
    "options",
    [replace(SHARED, scratch_limit_bytes=2**20), replace(SHARED, plugin=False)],
    ids=["workspace", "no plugin"],
)
def test_engines_built_with_other_limits_are_as_good(
    golden_engine: Path, tmp_path: Path, options: EngineOptions
) -> None:
    directory = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    StandInTensorrt(StandInDevice()).build_engines(EngineDir.open(directory), options, no_progress)
    assert asked(directory) == []


def test_of_two_weight_modes_the_complete_one_is_taken_and_then_the_one_with_fewer_kernels(
    engine: Path,
) -> None:
    tensorrt = StandInTensorrt(StandInDevice())
    options = replace(SHARED, weight_mode="embedded")
    manifest = tensorrt.build_engines(EngineDir.open(engine), options, no_progress)[0].manifest

    def chosen(manifest) -> str:
        directory = EngineDir(engine, manifest)
        return best_selection(directory, tensorrt.library, CAPABILITY).options.weight_mode

    assert chosen(manifest) == "embedded"
    embedded = next(entry for entry in manifest.engines if entry.weight_mode == "embedded")
    assert (
        chosen(replace(manifest, engines=tuple(e for e in manifest.engines if e != embedded)))
        == "shared"
    )


def test_a_builder_that_leaves_something_out_is_an_error(
    golden_engine: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    tensorrt = StandInTensorrt(StandInDevice())
    with pytest.raises(
        EnvironmentUnsupportedError, match="engines are missing right after they were built"
    ):
        tensorrt_backend(
            *(EngineDir.open(directory), tensorrt.library, CAPABILITY, tensorrt.device),
            build=lambda directory, _options, _progress: (directory, 0),
        )
