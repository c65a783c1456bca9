from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from goc_deploy.errors import ResourceError, UsageError
from tests.fuzz import workers
from tests.fuzz.workers import Trial, outcome, tried


def refuse(_: random.Random) -> None:
    raise UsageError("no")


def crash(_: random.Random) -> None:
    os.abort()


def hang(_: random.Random) -> None:
    while True:
        pass


def fail(_: random.Random) -> None:
    raise KeyError("x")


def fill_memory(_: random.Random) -> None:
    raise ResourceError("memory is full") from MemoryError()


def trials(_: Path) -> Mapping[str, Trial]:
    return {"fine": bool, "bad": refuse, "bug": fail, "crash": crash, "hang": hang}


def test_a_crash_and_a_hang_are_failures_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SLOW_SECONDS", 0.5)
    rarity = {"fine": 1, "bad": 1, "crash": 3, "hang": 4}
    tally = tried(trials, rarity, tmp_path, processes=1, seed=1, seconds=120, mutants=10)
    assert tally.failures == [
        "crash, --seed 3: ended the process (-6)",
        "hang, --seed 4: took more than 0.5 s",
    ]
    assert (tally.accepted["fine"], tally.refused["bad"]) == (4, 4)


def test_an_error_that_is_not_ours_or_memory_that_was_full_is_a_failure() -> None:
    assert outcome(bool, random.Random(0)) == "accepted"
    assert outcome(refuse, random.Random(0)) == "refused"
    for trial in (fail, fill_memory):
        assert "Traceback" in outcome(trial, random.Random(0))
