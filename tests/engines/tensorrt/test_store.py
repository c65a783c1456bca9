"""Engines of a small model, really built by TensorRT-RTX for three GPUs that are not here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from goc_deploy.api import build_engines
from goc_deploy.compiler import in_form
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest
from goc_deploy.engine_dir.reading import file_entry, read_manifest
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.jobs import wanted_engines
from goc_deploy.engines.tensorrt.library import library_from_backend, target_from_options
from goc_deploy.engines.tensorrt.process import build_process
from goc_deploy.engines.tensorrt.store import add_engine, is_there, read_engine
from goc_deploy.errors import ConflictError, EngineDirError, EnvironmentUnsupportedError
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.options import EngineOptions, no_progress
from tests.conftest import BIN, GOLDEN, Command
from tests.engines.directories import with_graph

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

CAPABILITIES = ("8.6", "8.9", "12.0")
SHARED = EngineOptions(capabilities=CAPABILITIES, weight_mode="shared")
FLAGS = (
    "--backend",
    "tensorrt-rtx",
    *(word for c in CAPABILITIES for word in ("--compute-capability", c)),
)


@pytest.fixture(scope="module")
def bare_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The golden model in fp16, without engines."""
    directory = tmp_path_factory.mktemp("half") / "engine"
    plans = ("--plan", "none", "--plan", "fora:2")
    options = ("--num-heads", 4, "--precision", "fp16", "--segments", "none")
    command("goc-export", GOLDEN / "model.pt", "-o", directory, *options, *plans)
    return directory


@pytest.fixture(scope="module")
def built_engine(bare_engine: Path, command: Command) -> Path:
    """The same with engines that share weights."""
    directory = Path(shutil.copytree(bare_engine, bare_engine.with_name("built")))
    done = command("goc-plan", directory, *FLAGS, "--engine-weights", "shared")
    assert "engines built for tensorrt-rtx" in done.stderr
    return directory


@pytest.fixture
def engine(built_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built_engine, tmp_path / "engine"))


def listed(directory: Path) -> dict[str, str]:
    """Path to digest of every engine."""
    opened = EngineDir.open(directory)
    return {e.path: opened.sha256(e.path) for e in opened.manifest.engines}


def test_with_shared_weights_one_engine_serves_every_unit_of_a_kind(built_engine: Path) -> None:
    directory = EngineDir.open(built_engine)
    manifest, plans = directory.manifest, directory.plans()
    graphs = [graph for engine in manifest.engines for graph in engine.graphs]
    launched = {
        signature
        for plan in plans
        for signature in in_form(plan, manifest.model, "device").signatures
    }
    assert launched == {"1*8"}  # and not the graphs that only the CPU launches
    assert sorted(graphs) == sorted(
        [*(u.onnx for u in manifest.graphs), *(manifest.predict[s] for s in launched)]
    )
    served = {e.graphs[0]: len(e.graphs) for e in manifest.engines if len(e.graphs) > 1}
    assert served == {"onnx/block_00_attn.onnx": 4, "onnx/block_00_mlp.onnx": 4}
    for entry in manifest.engines:
        assert entry.target.capabilities == CAPABILITIES
        assert bytes(read_engine(directory, entry)[:4]) == b"vtrt"
        assert entry.kernels
        assert entry.scratch_bytes is not None
        assert len(entry.optima) == 1
    assert not [*built_engine.glob("engines/*/timings*")]
    predicted = [e for e in manifest.engines if e.graphs[0] in manifest.predict.values()]
    assert predicted
    assert all(
        (e.kernels, e.plugin_layers, e.scratch_bytes) == (1, 0, 0) for e in predicted
    )  # TensorRT fuses these


def test_the_library_tells_an_engine_without_its_gpu_from_what_is_no_engine(
    built_engine: Path,
) -> None:
    directory = EngineDir.open(built_engine)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    for entry in directory.manifest.engines[:3]:
        content = bytes(read_engine(directory, entry))
        assert int.from_bytes(content[16:24], "little") == len(content)
        validity, diagnostics = runtime.get_engine_validity(content)
        malformed = runtime.get_engine_validity(b"x" * len(content))[1]
        assert validity == trt.EngineValidity.VALID or diagnostics != malformed


def test_embedded_weights_make_an_engine_per_unit_beside_the_shared_ones(engine: Path) -> None:
    before = listed(engine)
    manifest, built = build_engines(engine, replace(SHARED, weight_mode="embedded"), no_progress)
    assert built == 10  # 8 units of blocks, embed, final; the rest holds no weights and is there
    embedded = [e for e in manifest.engines if e.weight_mode == "embedded"]
    assert sorted(e.graphs[0] for e in embedded) == sorted(
        u.onnx for u in manifest.graphs if u.weights_file and not u.weights_are_inputs
    )
    assert before.items() <= listed(engine).items()
    assert build_engines(engine, SHARED, no_progress)[1] == 0


def test_bf16_engines_build_and_their_tensors_are_bf16(tmp_path: Path, command: Command) -> None:
    options = (
        "--num-heads",
        4,
        "--precision",
        "bf16",
        "--plan",
        "fora:2",
        "--engine-weights",
        "shared",
    )
    done = command("goc-export", GOLDEN / "model.pt", "-o", tmp_path / "engine", *options, *FLAGS)
    assert "engines built for tensorrt-rtx" in done.stderr
    found = command("goc-plan", tmp_path / "engine", "--inspect").stdout
    assert "sm86+sm89+sm120" in found
    assert "unknown" not in found
    assert "missing" not in found


def test_what_is_there_is_not_built_again(engine: Path, command: Command) -> None:
    before = (engine / MANIFEST_NAME).read_bytes()
    done = command("goc-plan", engine, *FLAGS, "--engine-weights", "shared")
    assert ": 0 engines built" in done.stderr
    assert (engine / MANIFEST_NAME).read_bytes() == before


def test_damaged_engines_are_built_again_and_no_other(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = listed(engine)
    truncated, flipped, foreign, missing, other = list(before)[-5:]
    (engine / truncated).write_bytes((engine / truncated).read_bytes()[:1000])
    content = bytearray((engine / flipped).read_bytes())
    content[len(content) // 2] ^= 1
    (engine / flipped).write_bytes(content)
    shutil.copyfile(engine / other, engine / foreign)
    (engine / missing).unlink()
    manifest, built = build_engines(engine, SHARED, no_progress)
    assert built == 4
    assert caplog.text.count("an engine is built again") == 4
    after = listed(engine)
    assert {path for path in after if after[path] != before[path]} <= {
        truncated,
        flipped,
        foreign,
        missing,
    }
    assert all(read_engine(EngineDir(engine, manifest), entry) for entry in manifest.engines)


def test_an_engine_whose_bytes_are_no_engine_is_refused_although_its_digest_is_right(
    engine: Path,
) -> None:
    manifest = read_manifest(engine)
    entry = manifest.engines[0]
    (engine / entry.path).write_bytes(b"no engine")
    files = tuple(f for f in manifest.files if f.path != entry.path)
    manifest = replace(manifest, files=(*files, file_entry(engine, entry.path)))
    with pytest.raises(EngineDirError, match="is not an engine of tensorrt-rtx"):
        read_engine(EngineDir(engine, manifest), entry)


def test_another_graph_weights_or_option_is_another_engine(engine: Path) -> None:
    manifest, library = read_manifest(engine), library_from_backend("tensorrt-rtx")
    target = target_from_options(library, CAPABILITIES, "fp16")

    def missing(manifest: Manifest, **options: object) -> int:
        directory = EngineDir(engine, manifest)
        jobs = wanted_engines(directory, target, replace(SHARED, **options))  # type: ignore[arg-type]
        return sum(not is_there(directory, job) for job in jobs)

    everything = len(manifest.engines)
    assert missing(manifest) == 0
    assert missing(manifest, scratch_limit_bytes=2**30) == everything
    assert missing(replace(manifest, max_batch=3)) == everything
    directory = EngineDir(engine, manifest)
    jobs = wanted_engines(directory, replace(target, version="9"), SHARED)
    assert not any(is_there(directory, job) for job in jobs)
    changed = onnx.load(engine / "onnx/collect.onnx")
    changed.graph.node[0].op_type = "Sub"
    with_graph(engine, "onnx/collect.onnx", changed.SerializeToString())
    assert missing(read_manifest(engine)) == 1
    new, built = build_engines(engine, SHARED, no_progress)
    assert built == 1
    assert len(new.engines) == everything  # the one of the old graph is gone, file and all
    assert len([*engine.glob("engines/*/collect*")]) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from goc_deploy.api import build_engines
from goc_deploy.options import EngineOptions
replace, left = os.replace, int(sys.argv[2])
def replace_or_die(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = replace_or_die
options = EngineOptions(capabilities=("8.6", "8.9", "12.0"), weight_mode="shared")
build_engines(Path(sys.argv[1]), options, lambda *_: None)
"""


@pytest.mark.parametrize("replacements", [0, 5])
def test_killing_a_build_leaves_a_usable_directory_and_what_was_built(
    replacements: int, bare_engine: Path, tmp_path: Path, command: Command
) -> None:
    engine = Path(shutil.copytree(bare_engine, tmp_path / "engine"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(engine), str(replacements)], timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    manifest = read_manifest(engine)
    assert len(manifest.engines) == replacements // 2  # an engine's file, then the manifest
    assert all(read_engine(EngineDir(engine, manifest), entry) for entry in manifest.engines)
    command("goc-run", engine, "--labels", "1", "--latents-output", tmp_path / "x.npy")
    progress: list[int] = []
    manifest, built = build_engines(
        engine, SHARED, lambda _what, done, _total: progress.append(done)
    )
    assert built == len(manifest.engines) - replacements // 2
    assert progress == [*range(replacements // 2, len(manifest.engines) + 1)]
    left = {path.name for path in engine.glob("engines/**/*") if path.is_file()}
    listed_names = {Path(entry.path).name for entry in manifest.engines}
    assert {name for name in left - listed_names if not name.startswith(".")} == set()


def test_two_processes_that_build_the_same_share_the_work(
    bare_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(bare_engine, tmp_path / "engine"))
    words = [str(BIN / "goc-plan"), str(engine), *FLAGS, "--engine-weights", "shared"]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    total = len(read_manifest(engine).engines)
    assert sorted(int(text.split(": ")[1].split()[0]) for text in said) == [0, total]


def test_a_directory_that_was_replaced_meanwhile_gets_no_engine_of_the_old_one(
    bare_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(bare_engine, tmp_path / "engine"))

    def replace_sampler(what: str, _done: int, _total: int) -> None:
        if what == "building sampler":
            model = onnx.load(engine / "onnx/sampler.onnx")
            model.producer_name = "another export"
            with_graph(engine, "onnx/sampler.onnx", model.SerializeToString())

    with pytest.raises(
        EngineDirError, match=r"sampler.onnx .*(was changed|bytes but the manifest says)"
    ):
        build_engines(engine, SHARED, replace_sampler)
    assert not [e for e in read_manifest(engine).engines if e.graphs == ("onnx/sampler.onnx",)]


def test_an_engine_whose_graph_was_replaced_while_it_was_built_is_not_added(engine: Path) -> None:
    directory = EngineDir.open(engine)
    target = target_from_options(library_from_backend("tensorrt-rtx"), CAPABILITIES, "fp16")
    job = next(j for j in wanted_engines(directory, target, SHARED) if j.unit.name == "sampler")
    with_graph(engine, job.unit.onnx, (engine / job.unit.onnx).read_bytes() + b" ")
    before = (engine / MANIFEST_NAME).read_bytes()
    with pytest.raises(
        ConflictError, match="was replaced while engines were built for it; run again"
    ):
        add_engine(directory, job, b"vtrt", BuildReport())
    assert (engine / MANIFEST_NAME).read_bytes() == before


def test_an_interrupted_build_ends_its_process(bare_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(bare_engine, tmp_path / "engine"))
    before = set(children())

    def interrupt(_what: str, done: int, _total: int) -> None:
        if done == 2:
            assert set(children()) - before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(engine, SHARED, interrupt)
    assert not set(children()) - before
    assert len(read_manifest(engine).engines) == 2


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_unit_that_cannot_be_built_is_named_with_its_op_and_the_reason(
    engine: Path, command: Command
) -> None:
    model = onnx.load(engine / "onnx/collect.onnx")
    model.graph.node[0].op_type, model.graph.node[0].name = (
        "Where",
        "odd_one",
    )  # which takes three inputs
    with_graph(engine, "onnx/collect.onnx", model.SerializeToString())
    done = command("goc-plan", engine, *FLAGS, "--engine-weights", "shared", code=5)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unit collect: tensorrt-rtx 1.")
    assert "for 8.6, 8.9, 12.0 cannot be built: node odd_one (Where): " in line
    assert "Traceback" not in done.stderr


def test_a_graph_that_asks_for_a_file_is_not_parsed(engine: Path, command: Command) -> None:
    model = onnx.load(engine / "onnx/collect.onnx")
    stolen = model.graph.initializer.add(name="stolen", data_type=1, dims=[4], data_location=1)
    stolen.external_data.add(key="location", value="etc/passwd")
    with_graph(engine, "onnx/collect.onnx", model.SerializeToString())
    done = command("goc-plan", engine, *FLAGS, "--engine-weights", "shared", code=9)
    assert "asks for the values of 'stolen' from 'etc/passwd'" in done.stderr


@pytest.fixture
def stacking_engine(engine: Path) -> Path:
    """With a prediction launch that stores more than TensorRT fuses."""
    manifest, path = read_manifest(engine), "onnx/predict_stack.onnx"
    graph = predict_graph("1*2 2w*12", manifest.model, "fp16")
    with_graph(
        engine, path, graph.SerializeToString(), predict={**manifest.predict, "1*2 2w*12": path}
    )
    return engine


def test_a_stack_that_tensorrt_does_not_fuse_is_one_launch_of_the_plugin(
    stacking_engine: Path, command: Command
) -> None:
    done = command("goc-plan", stacking_engine, *FLAGS, "--engine-weights", "shared")
    assert ": 1 engines built" in done.stderr
    assert "1 with the plugin" in done.stderr
    entry = next(
        e
        for e in read_manifest(stacking_engine).engines
        if e.graphs == ("onnx/predict_stack.onnx",)
    )
    assert (entry.kernels, entry.plugin_layers, entry.scratch_bytes) == (1, 1, 0)
    command("goc-plan", stacking_engine, *FLAGS, "--engine-weights", "shared", "--no-plugin")
    (entry,) = [
        e
        for e in read_manifest(stacking_engine).engines
        if e.graphs == ("onnx/predict_stack.onnx",)
    ]
    assert entry.plugin_layers == 0
    assert entry.kernels
    assert entry.kernels > 12  # one per prediction that is stored, and one more


def test_where_the_parser_cannot_use_the_plugin_the_bodies_are_built_and_the_log_says_so(
    stacking_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = subprocess.Popen

    def without_the_library_path(*args: Any, env: dict[str, str] | None = None, **how: Any) -> Any:
        if env is not None:
            env = {name: value for name, value in env.items() if name != "LD_LIBRARY_PATH"}
        return start(*args, env=env, **how)

    monkeypatch.setattr(subprocess, "Popen", without_the_library_path)
    manifest, built = build_engines(stacking_engine, SHARED, no_progress)
    assert built == 1
    entry = next(e for e in manifest.engines if e.graphs == ("onnx/predict_stack.onnx",))
    assert entry.plugin_layers == 0
    assert "with the plugin cannot be built: it ended with exit code -6" in caplog.text
    assert "built from the function bodies instead" in caplog.text


@pytest.mark.parametrize("plugin", [True, False])
def test_the_parser_takes_the_plugin_where_it_is_registered_and_the_body_elsewhere(
    plugin: bool, built_engine: Path
) -> None:
    from goc_deploy.engine_dir.keys import dimension_ranges
    from goc_deploy.engines.tensorrt import graphs
    from goc_deploy.engines.tensorrt.build import BuildRequest

    spec = read_manifest(built_engine).model
    with build_process("tensorrt-rtx", plugin=plugin) as process:
        for precision in ("fp32", "fp16", "bf16"):
            model = predict_graph("1*1 3w*1", spec, precision)
            shapes, _ = graphs.input_shapes(model, dimension_ranges(spec, 4, 20), "here")
            built = process.build(graphs.graph_bytes(model), BuildRequest([shapes], ["8.6"], 0))
            assert not built.report.refusal
            assert built.engine[:4] == b"vtrt"
            assert built.report.plugin_layers == (2 if plugin else 0)


def test_a_build_process_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, bare_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(bare_engine, tmp_path / "engine"))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"unit conditioning: tensorrt-rtx .* it ended with exit code 1",
    ):
        build_engines(engine, SHARED, no_progress)


def test_the_manifest_refuses_engines_of_an_unknown_kind(engine: Path, command: Command) -> None:
    found = json.loads((engine / MANIFEST_NAME).read_text())
    found["engines"][0]["target"]["backend"] = "other"
    (engine / MANIFEST_NAME).write_text(json.dumps(found))
    done = command("goc-plan", engine, "--inspect", code=4)
    assert "$.engines[0].target.backend: expected tensorrt-rtx or tensorrt, got" in done.stderr
