"""Plans as text for people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from goc_deploy.compiler import compile_schedule
from goc_deploy.display.plans import calibration_lines, history_rows
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.schedule import COMPUTE, Schedule

GAIN = {"step": 1, "penalty": 1e-6, "train": [0.02, 0.01], "held_out": [0.03, 0.015]}


def lines(head: object) -> list[str]:
    return calibration_lines(
        Schedule(1, ("attn",), ((COMPUTE,),) * 2, provenance={"head": head}),
    )


def test_a_head_is_shown_with_its_errors_and_the_gain_of_every_step() -> None:
    head = {"features": "patch", "held_out_error": 0.0142, "calibration": {"images": 64}}
    assert lines({**head, "by_step": [GAIN]}) == [
        "head: features patch, held_out_error 0.0142, images 64",
        "  step 1: penalty 1e-06, error of training images 0.0200 to 0.0100, of held-out images "
        "0.0300 to 0.0150",
    ]


def test_a_record_that_somebody_edited_is_shown_as_it_is() -> None:
    edited = [{**GAIN, "train": "less"}, "step 2", {"step": 3}]
    assert lines({"by_step": edited}) == [
        "head: ",
        "  step 1: penalty 1e-06, error of training images less, of held-out images "
        "0.0300 to 0.0150",
    ]


def test_the_trials_of_a_search_with_a_head_are_shown() -> None:
    tried = {"steps": 20, "computed": [0, 3, 6], "features": "patch", "error": 0.01234}
    assert lines({"tried": [tried]})[1:] == ["  20 steps, computed 0, 3, 6, patch: error 0.0123"]
    assert lines({"tried": [{"steps": 20}, 3]})[1:] == []


def test_the_memory_of_a_plan_is_shown_for_every_form(golden_engine: Path) -> None:
    directory = EngineDir.open(golden_engine)
    plan = directory.plan("fora:2")
    residual = compile_schedule(replace(plan.schedule, level="residual"), directory.manifest.model)
    columns, rows = history_rows([plan, residual], directory.manifest)
    assert columns == ["plan", "naive MB/image", "host MB", "device MB", "sums MB"]
    feature = 2 * 16 * 64 * 4 / 1e6
    sizes = [f"{count * feature:.2f}" for count in (16, 5, 8, 2)]
    assert rows[0] == ["fora-2", *sizes]
    assert rows[1][-1] == "no such form"
