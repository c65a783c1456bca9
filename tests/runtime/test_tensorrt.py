"""Sessions on TensorRT, on stand-ins for the GPU and the library (`tests.stand_ins`)."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.compiler import Launch, Plan, Predict, compile_schedule
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import WEIGHT_MODES
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.plugin import stacking
from goc_deploy.errors import ResourceError
from goc_deploy.runtime import session
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.trace import Span
from tests.conftest import GOLDEN, GOLDEN_PLANS
from tests.reference import relative_l2, worst_step
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import copy_with_engines, stand_in_backend, stand_in_pipeline

GRADIENT = "fora:2+gc:1.2"


@pytest.fixture(scope="module")
def engines(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden model with the stand-in's engines, by weight mode."""
    root = tmp_path_factory.mktemp("stand-in")
    return {
        weights: copy_with_engines(golden_engine, root / weights, weights)
        for weights in WEIGHT_MODES
    }


def distinct_steps(plan: Plan) -> int:
    """Steps that differ in what they launch on which slots; numbers do not count."""

    def used(op: Launch) -> object:
        return (
            replace(op, predictions=tuple((p.slots, p.store) for p in op.predictions))
            if isinstance(op, Predict)
            else op
        )

    return len({tuple(map(used, launches)) for launches in plan.launches})


@pytest.mark.parametrize(
    ("spec", "graphs"),
    [("none", 1), ("fora:2", 2), (GRADIENT, 6), (f"l2c:{GOLDEN / 'router.pt'}@0.1", 11)],
)
def test_steps_of_a_kind_are_one_graph(engines: dict[str, Path], spec: str, graphs: int) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], spec)
    for _ in range(3):
        report = pipe.generate([1]).report
    captured = [nodes for what, nodes in tensorrt.device.calls if what == "capture"]
    assert len(captured) == graphs
    assert (report["recorded_graphs"], report["recorded_nodes"]) == (graphs, sum(captured))


def test_seed_and_scale_of_each_image_reach_steps_that_are_recorded(
    engines: dict[str, Path],
) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], GRADIENT)
    for seeds, scales in (([5, 6], [1.0, 4.0]), ([7, 8], [2.0, 3.0]), ([6, 5], [4.0, 1.0])):
        together = pipe.generate([1, 7], seed=seeds, cfg_scale=scales).latents
        for image, (seed, scale) in enumerate(zip(seeds, scales, strict=True)):
            alone = pipe.generate([[1, 7][image]], seed=seed, cfg_scale=scale).latents
            assert relative_l2(together[image : image + 1], alone) < 1e-6
    assert any(what == "replay" for what, *_ in tensorrt.device.calls)


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_golden_trajectories_launched_one_by_one_and_replayed(
    engines: dict[str, Path], golden: dict[str, np.ndarray], weights: str, spec: str
) -> None:
    pipe, tensorrt = stand_in_pipeline(engines[weights], spec)
    request = {"cfg_scale": 2.0, "latents": golden["noise"], "trajectory": True}
    first = pipe.generate(golden["labels"], **request)
    launched = len(tensorrt.calls)
    replayed = pipe.generate(golden["labels"], **request)
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5
    np.testing.assert_array_equal(replayed.trajectory, first.trajectory)
    done = Counter(call[0] for call in tensorrt.device.calls)
    assert (done["capture"], done["replay"]) == (distinct_steps(pipe.plan), 20)
    assert (
        len(tensorrt.calls) <= 2 * launched
    )  # launched, then recorded once for all steps of a kind


def test_tensorrt_that_is_not_rtx_runs_without_a_runtime_configuration(
    golden_engine: Path, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared", "tensorrt")
    pipe, tensorrt = stand_in_pipeline(engine, GRADIENT, library="tensorrt")
    found = pipe.generate(golden["labels"], cfg_scale=2.0, latents=golden["noise"])
    assert relative_l2(found.latents, golden["fora_50_gc"][-1]) < 1e-5
    assert found.report["backend"] == "tensorrt"
    assert set(tensorrt.profiles_used) == {0}
    tensorrt.profiles_used.clear()
    pipe.generate([1] * 16)
    assert (
        tensorrt.profiles_used.count(1) > tensorrt.profiles_used.count(0) > 0
    )  # 0 is all that some engines have


def test_stacks_of_the_plugin_follow_the_golden_trajectory(
    golden_engine: Path,
    golden: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stacking, "STORES_THAT_FUSE", 3)
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared")
    stacks = [entry for entry in read_manifest(engine).engines if entry.plugin_layers]
    assert stacks
    pipe, tensorrt = stand_in_pipeline(engine, GRADIENT)
    for _ in range(2):
        found = pipe.generate(golden["labels"], cfg_scale=2.0, latents=golden["noise"])
        assert relative_l2(found.latents, golden["fora_50_gc"][-1]) < 1e-5
    assert "GocCacheStack" in tensorrt.registered


@pytest.mark.parametrize("kernels", [None, 9])
def test_predictions_of_several_kernels_are_written_beside_the_entry_that_dies_and_copied(
    golden_engine: Path, golden: dict[str, np.ndarray], tmp_path: Path, kernels: int | None
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared", kernels=kernels)
    pipe, tensorrt = stand_in_pipeline(engine, GRADIENT)
    for _ in range(2):
        found = pipe.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
        assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-5
    predictions = [addresses for _, addresses in tensorrt.calls if "g0" in addresses]
    assert predictions
    for addresses in predictions:
        history = {address for name, address in addresses.items() if "_" in name}
        assert not history & {addresses[f"g{unit}"] for unit in range(8)}


def test_predictions_of_one_kernel_are_written_over_the_entry_that_dies(
    engines: dict[str, Path],
) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], GRADIENT)
    pipe.generate([1])
    predictions = [addresses for _, addresses in tensorrt.calls if "g0" in addresses]
    for addresses in predictions[1:]:  # the first finds one entry, which lives on
        history = {address for name, address in addresses.items() if "_" in name}
        assert {addresses[f"g{unit}"] for unit in range(8)} <= history


def test_a_step_that_computes_nothing_is_one_launch_over_the_history(
    engines: dict[str, Path],
) -> None:
    pipe, _ = stand_in_pipeline(engines["shared"], GRADIENT)
    spans: list[Span] = []
    pipe.generate([1], spans=spans)
    launches: list[list[str]] = [[]]
    for span in spans:
        if span.category == "launch":
            launches[-1].append(span.name)
        elif span.category == "step":
            launches.append([])
    assert launches[5] == ["start", "embed", "predict 0-7", "final", "sampler"]
    assert launches[4] == ["start", "embed", "segment", "final", "sampler"]


@pytest.mark.parametrize("weights", WEIGHT_MODES)
@pytest.mark.parametrize("spec", [GRADIENT, f"l2c:{GOLDEN / 'router.pt'}@0.1"])
def test_without_segments_units_are_launched_and_the_trajectory_is_the_same(
    golden_engine: Path,
    engines: dict[str, Path],
    golden: dict[str, np.ndarray],
    tmp_path: Path,
    weights: str,
    spec: str,
) -> None:
    apart = copy_with_engines(golden_engine, tmp_path / "engine", weights, segments=False)
    request = {"cfg_scale": 2.0, "latents": golden["noise"], "trajectory": True}
    expected, found = (stand_in_pipeline(path, spec) for path in (apart, engines[weights]))
    trajectories = [
        pipe.generate(golden["labels"], **request).trajectory for pipe, _ in (expected, found)
    ]
    assert worst_step(trajectories[0], golden[GOLDEN_PLANS[spec]]) < 1e-5
    assert worst_step(trajectories[1], trajectories[0]) < 1e-5
    assert len(found[1].calls) < len(expected[1].calls)


def test_weights_are_on_the_device_once_for_units_and_segments(engines: dict[str, Path]) -> None:
    used, loaded = {}, {}
    for all_units in (False, True):
        backend, tensorrt = stand_in_backend(engines["shared"])
        opened = EngineDir.open(engines["shared"])
        pipes = load_pipelines(opened, backend, ["none"], 1, 1, all_units=all_units)
        assert pipes[0].plan.segment_signatures
        used[all_units] = tensorrt.device.capacity - tensorrt.device.free_bytes()
        loaded[all_units] = tensorrt.loaded
    assert used[True] == used[False]
    assert loaded[True] > loaded[False]


def test_another_plan_runs_on_the_units_where_they_were_loaded(
    engines: dict[str, Path], golden: dict[str, np.ndarray]
) -> None:
    backend, _ = stand_in_backend(engines["embedded"])
    opened = EngineDir.open(engines["embedded"])
    (pipe,) = load_pipelines(opened, backend, ["fora:2"], None, 1, all_units=True)
    spec = pipe.spec
    plan = compile_schedule(
        Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * 20), spec
    )
    found = pipe.with_plan(plan).generate(golden["labels"], cfg_scale=2.0, latents=golden["noise"])
    assert relative_l2(found.latents, golden["no_cache"][-1]) < 1e-5


def test_without_graphs_every_launch_is_made_every_time(engines: dict[str, Path]) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["embedded"], GRADIENT, graphs=False)
    first = pipe.generate([3, 1], seed=2).latents
    launched = len(tensorrt.calls)
    np.testing.assert_array_equal(pipe.generate([3, 1], seed=2).latents, first)
    assert len(tensorrt.calls) == 2 * launched
    assert not {"capture", "replay"} & {call[0] for call in tensorrt.device.calls}


@pytest.mark.parametrize("graphs", [True, False])
def test_the_loop_allocates_nothing_and_reads_back_only_what_is_asked_for(
    engines: dict[str, Path], graphs: bool
) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], GRADIENT, graphs=graphs)
    pipe.generate([3, 1])
    for _ in range(2):
        tensorrt.device.calls.clear()
        pipe.generate([3, 1])
        done = Counter(call[0] for call in tensorrt.device.calls)
        assert (done["allocate"], done["download"]) == (0, 1)


def test_requests_of_other_shapes_and_values_replay_nothing_stale(engines: dict[str, Path]) -> None:
    pipe, _ = stand_in_pipeline(engines["shared"], GRADIENT)
    fresh, _ = stand_in_pipeline(engines["shared"], GRADIENT, graphs=False)
    for labels, seed in [
        ([3, 1], 1),
        ([5], 2),
        ([3, 3], 3),
        ([3, 1], 4),
        ([5], 5),
        ([2, 8], 6),
        ([3, 1], 7),
    ]:
        found, expected = (one.generate(labels, seed=seed).latents for one in (pipe, fresh))
        np.testing.assert_array_equal(found, expected)


def test_a_graph_serves_every_request_of_as_many_images(engines: dict[str, Path]) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], "none")
    for labels in ([3, 3], [1, 2]):
        pipe.generate(labels)
    launched = len(tensorrt.calls)
    for labels in ([0, 9], [4, 4]):
        pipe.generate(labels)
    assert len(tensorrt.calls) == launched + 2  # the conditioning of each request
    done = Counter(call[0] for call in tensorrt.device.calls)
    assert (done["capture"], done["replay"]) == (1, 60)


def test_contexts_of_shapes_that_are_forgotten_are_freed(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_BOUND_SHAPES", 1)
    pipe, tensorrt = stand_in_pipeline(engines["shared"], "none")
    sizes = []
    for images in (1, 2, 3):
        pipe.generate([1] * images)
        gc.collect()
        sizes.append(len(tensorrt.contexts))
    assert 0 < sizes[0] == sizes[1] == sizes[2]


def test_sessions_on_streams_of_their_own_share_weights_and_nothing_else(
    engines: dict[str, Path],
) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["shared"], GRADIENT, sessions=2)
    alone = {seed: pipe.generate([seed], seed=seed).latents for seed in range(4)}
    uploaded = sum(nbytes for what, nbytes in tensorrt.device.calls if what == "allocate")
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(first: int) -> None:
        try:
            barrier.wait()
            for seed in (first, first + 2, first):
                np.testing.assert_array_equal(pipe.generate([seed], seed=seed).latents, alone[seed])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert len(tensorrt.device.streams) == 3  # one sets up
    second = sum(nbytes for what, nbytes in tensorrt.device.calls if what == "allocate") - uploaded
    report = pipe.generate([1]).report
    assert second < uploaded - report["weight_bytes"] / 2  # the weights were not uploaded again


def test_memory_is_reported_and_refused_before_anything_is_allocated(
    engines: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device = StandInDevice(capacity=3_000_000)
    with pytest.raises(
        ResourceError,
        match=r"of weights, and for each of 2 sessions of 16 images .* of scratch memory, but "
        r"0.00 GB are",
    ):
        stand_in_pipeline(engines["embedded"], GRADIENT, sessions=2, capacity=device.capacity)
    pipe, tensorrt = stand_in_pipeline(engines["embedded"], GRADIENT)
    assert "plan fora-2+gc-1.2 in the form device takes 0.0" in caplog.text
    report = pipe.generate([1]).report
    used = tensorrt.device.capacity - tensorrt.device.free_bytes()
    assert report["weight_bytes"] > 1_000_000
    assert used <= report["weight_bytes"] + report["scratch_bytes"] + report["buffer_bytes"] + 2**20


def test_closing_a_pipeline_gives_its_memory_back(engines: dict[str, Path]) -> None:
    pipe, tensorrt = stand_in_pipeline(engines["embedded"], GRADIENT)
    pipe.generate([1])
    used = tensorrt.device.capacity - tensorrt.device.free_bytes()
    buffers = pipe.generate([1]).report["buffer_bytes"]
    pipe.close()
    assert used - (tensorrt.device.capacity - tensorrt.device.free_bytes()) >= buffers
