from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import goc_deploy
from goc_deploy.api import cpu_backend
from goc_deploy.compiler import compile_schedule
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.host import HostDevice
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import (
    EnvironmentUnsupportedError,
    ResourceError,
    UsageError,
    VerificationError,
)
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.exporters.graphs.step import sampler_graphs
from goc_deploy.protocols import Buffer, Engine
from goc_deploy.runtime import buffers, modulation_buffers
from goc_deploy.runtime.loading import load_engines, load_pipelines
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.noise import image_noise
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule
from tests.conftest import GOLDEN, GOLDEN_PLANS
from tests.goc_deploy.strategies import schedules
from tests.reference import eager_trajectory, relative_l2, worst_step

LABELS = [1, 7, 4]


@pytest.fixture(scope="module")
def pipe(golden_engine: Path) -> Pipeline:
    return goc_deploy.load(golden_engine, plan="fora:2+gc:1.2", max_sessions=2)


@pytest.fixture(scope="module")
def model(pipe: Pipeline) -> DiT:
    model = DiT(pipe.spec).eval()
    model.load_state_dict(torch.load(GOLDEN / "model.pt", weights_only=True))
    return model


@pytest.fixture(scope="module")
def units(golden_engine: Path, pipe: Pipeline) -> dict[str, Engine]:
    """Every unit, and every form of the sampler; a pipeline loads only the one of its plan."""
    backend = OrtBackend()
    engines = load_engines(EngineDir.open(golden_engine), [], backend)
    samplers = {
        name: backend.load(memoryview(g.SerializeToString()), {})
        for name, g in sampler_graphs(pipe.spec).items()
    }
    return {**engines.units, **samplers}


def test_the_default_plan_is_the_first_that_caches(golden_engine: Path) -> None:
    assert goc_deploy.load(golden_engine).plan.name == "fora-2"


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_the_library_reproduces_the_golden_trajectories(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    with goc_deploy.load(golden_engine, plan=spec) as loaded:
        found = loaded.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
    assert worst_step(found.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5


def test_an_image_of_a_series_does_not_depend_on_where_requests_are_cut(pipe: Pipeline) -> None:
    whole = pipe.generate([*LABELS, 2], seed=3).latents
    tail = pipe.generate([4, 2], seed=3, first_image=2).latents
    np.testing.assert_allclose(tail, whole[2:], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UsageError, match="first_image must be a whole number and not negative, got -1"
    ):
        pipe.generate([1], first_image=-1)


def test_another_plan_runs_on_the_engines_that_are_loaded(
    pipe: Pipeline, golden_engine: Path
) -> None:
    with (
        goc_deploy.load(golden_engine, plan="none") as loaded,
        pipe.with_plan(loaded.plan) as other,
    ):
        expected = loaded.generate(LABELS, seed=1).latents
        np.testing.assert_array_equal(other.generate(LABELS, seed=1).latents, expected)


@settings(max_examples=12)
@given(
    schedules(depth=4, max_steps=5),
    st.sampled_from(["ddim", "ddim:0.7", "dpm++", "dpm++:3", "ddpm"]),
    st.integers(0, 3),
    st.sampled_from([1.5, 4.0]),
)
def test_any_schedule_runs_as_eager_pytorch_runs_it(
    pipe: Pipeline,
    model: DiT,
    units: dict[str, Engine],
    schedule: Schedule,
    sampler: str,
    cfg_channels: int,
    cfg: float,
) -> None:
    plan = compile_schedule(schedule, pipe.spec, sampler)
    backend = OrtBackend()
    predict = {
        s: backend.load(memoryview(predict_graph(s, pipe.spec, "fp32").SerializeToString()), {})
        for s in plan.signatures
    }
    runner = Pipeline(pipe.manifest, plan, Engines(units, predict), backend, 2, 1)
    found = runner.generate(
        LABELS, seed=5, cfg_scale=cfg, cfg_channels=cfg_channels, trajectory=True
    )
    draws = 1 + (plan.steps if plan.sampler.stochastic else 0)
    noise = np.stack([image_noise(5, i, draws, (4, 8, 8)) for i in range(3)])
    expected = eager_trajectory(
        model,
        schedule,
        sampler_table(sampler, schedule.steps, Process("eps")),
        noise,
        LABELS,
        cfg,
        cfg_channels,
    )
    assert worst_step(found.trajectory, expected) < 1e-4


def test_any_split_into_batches_gives_the_same_images(golden_engine: Path, pipe: Pipeline) -> None:
    labels = [3, 1, 4, 1, 5, 9, 2]
    whole = pipe.generate(labels, seed=11).latents
    for size in (1, 2, 3):
        with goc_deploy.load(golden_engine, plan="fora:2+gc:1.2", batch_size=size) as split:
            assert relative_l2(split.generate(labels, seed=11).latents, whole) < 1e-5
    first = pipe.generate(labels[:2], seed=11).latents
    assert relative_l2(first, whole[:2]) < 1e-5


def allocated(pipe: Pipeline) -> buffers.Buffers:
    return buffers.allocate_buffers(cpu_backend(), pipe.spec, "fp32", pipe.plan, pipe.batch_size)


@pytest.mark.parametrize(("table", "chunk"), [(1, 1), (2, 2), (7, 6), (8, 8)])
def test_the_modulation_table_may_be_filled_in_chunks(
    golden_engine: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, table: int, chunk: int
) -> None:
    whole = pipe.generate(LABELS, seed=1).latents
    row_bytes = 4 * pipe.spec.hidden * pipe.spec.modulation.count * (pipe.batch_size + 1)
    monkeypatch.setattr(modulation_buffers, "TABLE_BUDGET_BYTES", table * row_bytes)
    with goc_deploy.load(golden_engine, plan="fora:2+gc:1.2") as chunked:
        assert allocated(chunked).modulation.chunk == chunk
        assert relative_l2(chunked.generate(LABELS, seed=1).latents, whole) < 1e-5


def test_scale_one_skips_the_unconditional_rows_and_changes_nothing(pipe: Pipeline) -> None:
    unguided = pipe.generate(LABELS, cfg_scale=1.0).latents
    assert relative_l2(pipe.generate(LABELS, cfg_scale=1.000001).latents, unguided) < 1e-4
    np.testing.assert_array_equal(pipe.generate(LABELS, cfg_channels=0).latents, unguided)


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_a_seed_for_each_image_draws_what_requests_of_one_image_draw(
    golden_engine: Path, batch_size: int
) -> None:
    seeds = [5, 2**64 - 1, 5, 0]
    with goc_deploy.load(golden_engine, plan="fora:2+gc:1.2", batch_size=batch_size) as pipe:
        together = pipe.generate([1, 7, 4, 2], seed=seeds)
        alone = [
            pipe.generate([label], seed=seed).latents
            for label, seed in zip([1, 7, 4, 2], seeds, strict=True)
        ]
        np.testing.assert_array_equal(together.latents, np.concatenate(alone))
        later = pipe.generate([1, 7], seed=np.array([5, 6]), first_image=3).latents
        np.testing.assert_array_equal(later[1:], pipe.generate([7], seed=6, first_image=3).latents)
    assert json.loads(json.dumps(together.report))["seed"] == seeds


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_scale_for_each_image_guides_as_requests_of_one_image_do(
    golden_engine: Path, batch_size: int
) -> None:
    labels, scales = [1, 7, 4, 2], [1.5, 1, 4.0, 0]
    with goc_deploy.load(golden_engine, plan="fora:2+gc:1.2", batch_size=batch_size) as pipe:
        together = pipe.generate(labels, seed=[3] * 4, cfg_scale=scales)
        alone = [
            pipe.generate([label], seed=3, cfg_scale=s).latents
            for label, s in zip(labels, scales, strict=True)
        ]
        np.testing.assert_array_equal(together.latents, np.concatenate(alone))
        again = pipe.generate(labels, seed=[3] * 4, cfg_scale=4.0).latents
        np.testing.assert_array_equal(again[2], together.latents[2])
    assert together.report["cfg_scale"] == [1.5, 1.0, 4.0, 0.0]


def test_scales_of_one_for_each_image_skip_the_unconditional_rows(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(
        pipe.generate(LABELS, cfg_scale=np.ones(3)).latents,
        pipe.generate(LABELS, cfg_scale=1.0).latents,
    )


def test_threads_share_a_pipeline_and_get_what_they_would_get_alone(pipe: Pipeline) -> None:
    alone = {
        seed: pipe.generate([seed % 10] * (1 + seed % 3), seed=seed).latents for seed in range(8)
    }
    found: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        found[seed] = pipe.generate([seed % 10] * (1 + seed % 3), seed=seed).latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found.keys() == alone.keys()
    for seed, latents in alone.items():
        assert relative_l2(found[seed], latents) < 1e-6


def test_a_callback_sees_every_step_and_cannot_stop_the_run(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def callback(event: StepEvent) -> None:
        seen.append((event.step, event.kind, event.images))
        raise RuntimeError("from the user")

    pipe.generate([0, 1], callback=callback)
    assert seen[:3] == [(0, "full", 2), (1, "collapsed", 2), (2, "full", 2)]
    assert len(seen) == 20
    assert "the callback failed at step 0" in caplog.text


def test_the_report_says_what_ran(pipe: Pipeline) -> None:
    report = pipe.generate(LABELS, seed=3).report
    assert (report["plan"], report["backend"], report["provider"]) == (
        "fora-2+gc-1.2",
        "onnxruntime",
        "CPUExecutionProvider",
    )
    assert (report["computed_units"], report["all_units"], report["step_kinds"]) == (
        80,
        160,
        {"collapsed": 10, "full": 10},
    )
    steps = report["batches"][0]["steps"]
    assert [s["kind"] for s in steps[:2]] == ["full", "collapsed"]
    assert all(s["ms"] > 0 for s in steps)
    assert (
        report["cache_bytes"] == (11 + 1 + 1) * (2 * 16) * 16 * 64 * 4
    )  # slots, accumulator, zeros


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "labels are empty"),
        ({"labels": [0, 10]}, r"label 10 \(image 1\) must be a whole number within 0..9"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": [1.0]}, "label 1.0"),
        ({"labels": [True]}, "label True"),
        ({"labels": [1], "cfg_scale": float("nan")}, "cfg_scale must be"),
        ({"labels": [1], "cfg_scale": -1}, "cfg_scale must be"),
        (
            {"labels": [1], "cfg_channels": -1},
            "cfg_channels must be a whole number and not negative",
        ),
        ({"labels": [1], "seed": -1}, "seed must be"),
        (
            {"labels": [1], "seed": 1.5},
            "seed must be a whole number, or a list of one per image, got 1.5",
        ),
        (
            {"labels": [1], "seed": "1"},
            "seed must be a whole number, or a list of one per image, got '1'",
        ),
        ({"labels": [1, 2], "seed": [1, 2.5]}, "seed must be a whole number, .* got 2.5"),
        ({"labels": [1, 2], "seed": [1, 2**64]}, r"seed must be within 0\.\.2\*\*64-1"),
        (
            {"labels": [1, 2], "seed": [1]},
            "seed is a list of 1 for 2 images; give one number, or one for each image",
        ),
        ({"labels": [1], "cfg_scale": [1, 2]}, "cfg_scale is a list of 2 for 1 images"),
        (
            {"labels": [1, 2], "cfg_scale": [4, -1]},
            "cfg_scale must be a number within 0..1000, .* got -1",
        ),
        (
            {"labels": [1, 2], "cfg_scale": np.ones((2, 1))},
            "cfg_scale must be a number within 0..1000",
        ),
        ({"labels": [1], "cfg_channels": 1.5}, "cfg_channels must be a whole number"),
        (
            {"labels": [1], "latents": np.zeros((2, 4, 8, 8), np.float32)},
            r"shape \[2, 4, 8, 8\], expected \[1, 4, 8, 8\]",
        ),
        (
            {"labels": [1], "latents": np.zeros((1, 4, 8, 8), np.int64)},
            "dtype int64, expected float32",
        ),
        ({"labels": [1], "latents": np.full((1, 4, 8, 8), np.inf, np.float32)}, "NaN or infinite"),
        ({"labels": [1], "latents": np.full((1, 4, 8, 8), 1e39)}, "float32 cannot hold"),
        (
            {"labels": [1], "latents": torch.ones(1, 4, 8, 8, requires_grad=True)},
            r"no array: .* use latents.detach",
        ),
        (
            {"labels": [1], "latents": torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)},
            r"no array: .* use latents.detach",
        ),
        (
            {"labels": 5},
            "labels are a list of whole numbers, got 5; for one image give a list of one",
        ),
        ({"labels": np.array(5)}, "labels are a list of whole numbers, got array\\(5\\)"),
        ({"labels": "12"}, "labels are a list of whole numbers, got '12'"),
        (
            {"labels": [1], "cfg_scale": True},
            "cfg_scale must be a number within 0..1000, or a list of one per image, got True",
        ),
        (
            {"labels": [1], "cfg_scale": "4"},
            "cfg_scale must be a number within 0..1000, .* got '4'",
        ),
        ({"labels": [1, 2], "first_image": 2**64 - 1}, "leaves less than 2 images up to"),
    ],
)
def test_bad_requests_are_refused_and_the_pipeline_stays_usable(
    pipe: Pipeline, arguments: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.generate(**arguments)
    assert pipe.generate([1]).latents.shape == (1, 4, 8, 8)


def test_latents_of_any_memory_order_and_float_type_are_taken(
    pipe: Pipeline, golden: dict[str, np.ndarray]
) -> None:
    expected = pipe.generate(LABELS, latents=golden["noise"]).latents
    for odd in (
        np.asfortranarray(golden["noise"]),
        golden["noise"].astype(">f4"),
        golden["noise"].astype(np.float64),
        golden["noise"][::-1][::-1],
    ):
        odd.flags.writeable = False
        np.testing.assert_array_equal(pipe.generate(LABELS, latents=odd).latents, expected)


def test_results_that_are_not_finite_are_an_error(pipe: Pipeline) -> None:
    with (
        np.errstate(all="ignore"),
        pytest.raises(VerificationError, match="latents of image 1 are not finite"),
    ):
        pipe.generate([0, 1], latents=np.stack([np.zeros((4, 8, 8)), np.full((4, 8, 8), 3e38)]))


def test_an_image_that_is_not_finite_may_be_marked_and_leaves_its_neighbors_alone(
    pipe: Pipeline,
) -> None:
    start = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    good = pipe.generate(LABELS, latents=start)
    assert good.errors == {}
    start[1] = 3e38
    with np.errstate(all="ignore"):
        found = pipe.generate(LABELS, latents=start, on_nonfinite="mark")
    assert [(i, type(error)) for i, error in found.errors.items()] == [(1, VerificationError)]
    assert "the latents of image 1 are not finite" in str(found.errors[1])
    np.testing.assert_array_equal(found.latents[[0, 2]], good.latents[[0, 2]])
    assert not np.isfinite(found.latents[1]).all()
    with pytest.raises(UsageError, match="on_nonfinite must be one of raise, mark, got 'drop'"):
        pipe.generate(LABELS, on_nonfinite="drop")


def test_closing_twice_is_fine_and_a_closed_pipeline_says_so(golden_engine: Path) -> None:
    loaded = goc_deploy.load(golden_engine)
    loaded.warmup()
    assert not loaded.closed
    loaded.close()
    loaded.close()
    assert loaded.closed
    with pytest.raises(EnvironmentUnsupportedError, match="closed"):
        loaded.generate([0])


def test_closing_wakes_a_caller_that_waits_for_a_session(golden_engine: Path) -> None:
    loaded = goc_deploy.load(golden_engine)
    running, go_on, errors = threading.Event(), threading.Event(), []

    def hold(_event: StepEvent) -> None:
        running.set()
        go_on.wait(timeout=60)

    def wait() -> None:
        try:
            loaded.generate([1])
        except EnvironmentUnsupportedError as error:
            errors.append(str(error))

    first = threading.Thread(target=lambda: loaded.generate([0], callback=hold))
    first.start()
    running.wait(timeout=60)
    second = threading.Thread(target=wait)
    second.start()
    second.join(timeout=0.5)
    assert second.is_alive(), "there is one session, so the second caller waits"
    loaded.close()
    second.join(timeout=60)
    go_on.set()
    first.join(timeout=60)
    assert not first.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]


def test_interrupts_lose_no_session_and_spoil_no_image(golden_engine: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    loaded = goc_deploy.load(golden_engine, plan="fora:2")
    alone, moments, interrupted = loaded.generate([1, 2]).latents, np.random.default_rng(5), 0
    started = time.perf_counter()
    loaded.generate([1, 2])
    seconds = time.perf_counter() - started
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(100):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, moments.random() * 1.1 * seconds))
                loaded.generate([1, 2])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1  # a session that is lost makes the next request raise
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
    np.testing.assert_array_equal(loaded.generate([1, 2]).latents, alone)


def test_a_callback_that_generates_is_told_instead_of_waiting_for_itself(
    golden_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with goc_deploy.load(golden_engine) as loaded:
        loaded.generate([1], callback=lambda _: loaded.generate([1]))
    assert "do not generate from a callback, or load with a larger max_sessions" in caplog.text


def test_a_pipeline_cannot_be_pickled(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="load the engine directory in the other process"):
        pickle.dumps(pipe)


def _generate_in_child(pipe: Pipeline, answer: multiprocessing.Queue) -> None:
    try:
        pipe.generate([0])
    except EnvironmentUnsupportedError as error:
        answer.put(str(error))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_pipeline_inherited_over_a_fork_refuses_instead_of_hanging(pipe: Pipeline) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_generate_in_child, args=(pipe, answer))
    child.start()
    assert "loaded before a fork" in answer.get(timeout=60)
    child.join(timeout=60)


def test_a_plan_is_found_by_its_name_before_the_name_is_read_as_a_spec(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    named = replace(manifest.plans[1], name="nine.dpm++", policy="fora:9")
    directory = EngineDir(golden_engine, replace(manifest, plans=(*manifest.plans, named)))
    assert directory.plan_entry("nine.dpm++") == directory.plan_entry("fora:9") == named
    assert directory.plan_entry("fora:2").name == "fora-2"


def test_numbers_out_of_range_are_refused_at_load(golden_engine: Path) -> None:
    with pytest.raises(UsageError, match=r"batch size 17 must be within 1..16"):
        goc_deploy.load(golden_engine, batch_size=17)
    with pytest.raises(UsageError, match="max_sessions must be at least 1"):
        goc_deploy.load(golden_engine, max_sessions=0)
    for wrong in ({"batch_size": 1.5}, {"batch_size": "2"}, {"max_sessions": "2"}):
        with pytest.raises(UsageError, match="must be a whole number, got"):
            goc_deploy.load(golden_engine, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_sessions must be at least 1 and at most 1024"):
        goc_deploy.load(golden_engine, max_sessions=10**9)
    with pytest.raises(UsageError, match="a plan is named by its name or SPEC, got 5"):
        goc_deploy.load(golden_engine, plan=5)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match="there is no plan 'other'; this engine directory has none, fora-2"
    ):
        goc_deploy.load(golden_engine, plan="other")
    with pytest.raises(UsageError, match="there is no backend 'tensorflow'; use auto, tensorrt"):
        goc_deploy.load(golden_engine, backend="tensorflow")


class FullHost(HostDevice):
    """A host with next to no memory left."""

    def free_bytes(self) -> int:
        return 1000

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        raise AssertionError(f"{shape} of {dtype} is allocated")


def test_buffers_that_do_not_fit_into_memory_are_refused_before_allocation(
    golden_engine: Path,
) -> None:
    opened, backend = EngineDir.open(golden_engine), OrtBackend(device=FullHost())
    with pytest.raises(ResourceError, match="use a smaller batch size"):
        load_pipelines(opened, backend, [None], None, 1)


def test_planned_bytes_are_what_is_allocated(pipe: Pipeline) -> None:
    held = allocated(pipe)
    pairs = (
        *held.tokens,
        *held.slots,
        *held.accumulators,
        *held.latents,
        held.noise,
        *held.modulation.gates_ahead,
    )
    big = [held.modulation.table, held.modulation.rows, held.prediction, held.zeros, *pairs]
    assert sum(b.nbytes for b in big) == buffers.planned_bytes(
        pipe.spec, "fp32", pipe.plan, pipe.batch_size
    )


def test_an_engine_directory_that_cannot_be_written_still_loads(
    golden_engine: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(golden_engine, copy)
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert goc_deploy.load(copy).generate([0]).latents.shape == (1, 4, 8, 8)
