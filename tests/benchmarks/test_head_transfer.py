"""Distances of plans with other weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import head_transfer


def test_plans_are_compared_with_no_cache_with_the_same_weights(
    golden_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["none", "fora:2", "--weights", golden_engine, "--images", 3, "--cfg-scale", 2]
    assert head_transfer.main([str(golden_engine), *map(str, words)]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [title for title, _, _ in lines] == [
        *["own weights (3)"] * 2,
        *[f"weights of {golden_engine} (3)"] * 2,
    ]
    distances = [float(text.split(" ±")[0]) for _, _, text in lines]
    assert distances[0] == distances[2] == 0
    assert distances[1] == distances[3] > 0.001


def test_each_file_of_prompts_is_a_case(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("seen.txt", "unseen.txt")]
    for path in files:
        path.write_text("a fox\na cat\n")
    words = ["engine", "fora-2", "--cfg-scale", "2"]
    args = head_transfer.parser().parse_args(
        [*words, *(word for path in files for word in ("--prompts", str(path)))]
    )
    prompts = ["a fox", "a cat"]
    assert head_transfer.cases(args) == [
        ("seen (2)", prompts, None),
        ("unseen (2)", prompts, None),
    ]


def test_prompts_and_weights_are_refused_together() -> None:
    words = ["engine", "fora-2", "--cfg-scale", "2", "--prompts", "seen.txt", "--weights", "other"]
    with pytest.raises(SystemExit):
        head_transfer.parser().parse_args(words)
