"""The load of goc-serve: a short run, and what its tables tell."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from benchmarks import serving
from benchmarks.serving_clients import CANCELLED, Answers


def case(**changes: object) -> serving.Case:
    answers = Answers(Counter({"200": 3}), [0.1, 0.2, 0.3], 0, 1.5)
    for name, value in changes.items():
        setattr(answers, name, value)
    return serving.Case("a", "a", answers=answers, batches=2, batch_images=6)


def test_a_case_is_summed_up_over_its_rounds() -> None:
    one = case()
    one.answers.add(Answers(Counter({"200": 1, "429": 2}), [0.4], 0, 0.5))
    found = serving.summary(one)
    assert (found["pictures"], found["images_per_second"], found["images_per_batch"]) == (4, 2, 3)
    assert found["statuses"] == {"200": 4, "429": 2}
    assert found["p50_ms"] == pytest.approx(250)
    assert serving.passed(found)


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"statuses": Counter({"200": 1, "503": 1, CANCELLED: 1})}, True),
        ({"statuses": Counter({"200": 1, "500": 1})}, False),
        ({"statuses": Counter({"200": 1, "ReadError": 1})}, False),
        ({"different": 1}, False),
    ],
)
def test_only_busy_answers_and_cancels_are_by_design(changes: dict, right: bool) -> None:
    assert serving.passed(serving.summary(case(**changes))) is right


def test_servers_answer_many_clients_with_the_pictures_of_a_serial_run(
    demo_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, output = tmp_path / "serving.md", tmp_path / "new" / "serving.json"
    blocks = (f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("load", "resources"))
    document.write_text("".join(blocks))
    arguments = f"--clients 6 --seconds 2 --rounds 1 --pictures 5 --output {output}"
    more = ["--sample-seconds", "0.5", "--document", str(document)]
    assert serving.main([str(demo_engine), *arguments.split(), *more]) == 0
    found = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert set(found["exit_codes"].values()) == {0}
    assert found["cases"]["no batching"]["images_per_batch"] == 1
    assert CANCELLED in found["cases"]["dynamic batching, cancels"]["statuses"]
    for samples in found["samples"].values():
        assert samples[-1]["descriptors"] <= samples[0]["descriptors"] + 1
    assert "| dynamic batching |" in document.read_text()
    assert "equal to the serial run" in capsys.readouterr().out
