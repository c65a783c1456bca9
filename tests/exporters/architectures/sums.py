"""A plan whose history is kept as features, and the same with sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import goc_deploy
from goc_deploy.spec import ModelSpec
from tests.reference import relative_l2


def check_that_sums_take_the_place_of_features(
    engine: Path, plan: str, request_of: Callable[[ModelSpec], dict[str, Any]]
) -> None:
    """Draw with both; the latents differ by rounding only.

    Args:
        engine: the engine directory.
        plan: one of its plans.
        request_of: the captions and sizes to draw.
    """
    results = {}
    for history in ("features", "sums"):
        with goc_deploy.load(engine, plan=plan, history=history) as pipe:
            results[history] = pipe.generate(**request_of(pipe.spec), seed=1).latents
    assert relative_l2(results["sums"], results["features"]) < 1e-5
