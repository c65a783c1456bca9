"""The kinds of mutants that `tests.fuzz.run` tries."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fuzz.run import RARITY, trials
from tests.fuzz.workers import outcome


def test_a_mutant_of_every_kind_is_accepted_or_refused(golden_engine: Path, tmp_path: Path) -> None:
    made = trials(golden_engine, tmp_path)
    assert made.keys() == RARITY.keys()
    found = {kind: outcome(trial, random.Random(1)) for kind, trial in made.items()}
    assert {kind: text for kind, text in found.items() if text not in ("accepted", "refused")} == {}
