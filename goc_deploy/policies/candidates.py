"""Search: how many steps to take, which of them to compute and how to predict the others, chosen together.

A step that computes nothing costs about a hundredth of one that computes everything, so the best use of a few computed
steps is often many more steps than that. Candidates are judged by what they are for: the relative L2 distance of their
final latents to a converged solution (many steps, all computed) on a few calibration images. The search is a fixed
sequence of trials, so the same images find the same schedule:

    even spacing, every (step count, predictor)  ->  denser early or late  ->  single computed steps moved
    ->  where asked for, computed units exchanged for predicted ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.registration import correction_named
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, fill_short_history
from goc_deploy.spec import ModelSpec

INTERVALS = (1, 2, 3, 4, 5, 6, 8, 10)
PREDICTORS = ("gc:1.0", "taylor:2", "lagrange:1", "lagrange:2", "lagrange:3", "hermite:2")
WARPS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)
FINALISTS = 3
MAX_STEPS = 400

Measure = Callable[["Candidate"], float]
MeasureUnits = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that computes whole steps.

    Attributes:
        steps: sampling steps T.
        computed: the steps that compute every unit, rising, the first is 0.
        predictor: the correction part of a SPEC, such as ``lagrange:2``.
    """

    steps: int
    computed: tuple[int, ...]
    predictor: str

    def mask(self, spec: ModelSpec) -> np.ndarray:
        """(T, U) where a unit is computed."""
        mask = np.zeros((self.steps, spec.units), bool)
        mask[list(self.computed)] = True
        return mask

    def schedule(self, spec: ModelSpec) -> Schedule:
        """The candidate as a schedule for a model."""
        return predicted(plain(self.mask(spec), spec), self.predictor, spec)


def plain(mask: np.ndarray, spec: ModelSpec) -> Schedule:
    """The units that ``mask`` (T, U) says are computed, and plain reuse of the others."""
    rows = tuple(tuple(COMPUTE if computed else REUSE for computed in step) for step in mask)
    return Schedule(spec.depth, spec.branches, rows)


def predicted(schedule: Schedule, predictor: str, spec: ModelSpec) -> Schedule:
    """The schedule with a correction, such as ``lagrange:2``, in place of plain reuse."""
    named = parse_policy(f"none+{predictor}").correction
    correction = correction_named(named[0]) if named else None
    assert named is not None
    assert correction is not None
    context = PolicyContext(spec, schedule.steps, {})
    return fill_short_history(correction.apply(schedule, named[1], context))


def warped(steps: int, count: int, warp: float, tail: int) -> tuple[int, ...]:
    """``count`` computed steps of ``steps``, the last ``tail`` predicted: ``warp`` above 1 is denser early, below 1 late.

    Steps that round to one place move apart.
    """
    last = steps - 1 - tail
    places = [round(last * (i / max(count - 1, 1)) ** warp) for i in range(count)]
    for i in range(1, count):
        places[i] = max(places[i], places[i - 1] + 1)
    for i in reversed(range(count)):
        places[i] = min(places[i], steps - count + i)
    return tuple(places)


def search(
    sizes: Sequence[tuple[int, int]], predictors: Sequence[str], measure: Measure
) -> list[tuple[float, Candidate]]:
    """Try candidates.

    Args:
        sizes: (steps T, computed steps) to try.
        predictors: corrections to try.
        measure: the error of a candidate; called once for each.

    Returns:
        (error, candidate) of everything tried, best first.
    """
    tried: dict[Candidate, float] = {}

    def attempt(candidates: Iterable[Candidate]) -> list[Candidate]:
        for candidate in candidates:
            if candidate not in tried:
                tried[candidate] = measure(candidate)
        return sorted(tried, key=lambda c: (tried[c], c.steps, c.computed, c.predictor))

    best = attempt(_evenly_spaced(sizes, predictors))
    best = attempt(c for finalist in best[:FINALISTS] for c in _warped_variants(finalist))
    for stride in (2, 1):
        for i in range(1, len(best[0].computed)):
            best = attempt(_moved(best[0], i, stride))
    return [(tried[candidate], candidate) for candidate in best]


def flipped_errors(
    mask: np.ndarray, cells: Iterable[tuple[int, int]], measure: MeasureUnits
) -> dict[tuple[int, int], float]:
    """Each cell (step, unit) -> the error where only that unit is computed instead of predicted, or the other way round."""
    errors = {}
    for cell in cells:
        other = mask.copy()
        other[cell] = not other[cell]
        errors[cell] = measure(other)
    return errors


def exchange_units(
    mask: np.ndarray, branches: int, probe: MeasureUnits, measure: MeasureUnits
) -> tuple[int, np.ndarray, float]:
    """Predict the units that matter least and compute those that matter most in their place, as long as it helps.

    A unit is exchanged for one of the same branch, so the cost stays. What a unit matters is probed for each alone;
    then 1, 2, 4, ... of the most promising exchanges are made together and measured.

    Args:
        mask: (T, U) where a unit is computed; step 0 stays.
        branches: branches per block; unit u is of branch ``u % branches``.
        probe: the error of a mask, called for every unit of every step but 0.
        measure: the error that decides, called for a few masks.

    Returns:
        How many exchanges, the mask with the least error, and that error.
    """
    cells = [(k, u) for k in range(1, len(mask)) for u in range(mask.shape[1])]
    now, errors = probe(mask), flipped_errors(mask, cells, probe)
    pairs: list[tuple[float, tuple[int, int], tuple[int, int]]] = []
    for branch in range(branches):
        ranked = sorted(
            (error - now, cell) for cell, error in errors.items() if cell[1] % branches == branch
        )
        dropped = [(change, cell) for change, cell in ranked if mask[cell]]
        added = [(change, cell) for change, cell in ranked if not mask[cell]]
        pairs += [
            (loss + gain, drop, add)
            for (loss, drop), (gain, add) in zip(dropped, added, strict=False)
        ]
    promising = sorted(pair for pair in pairs if pair[0] < 0)
    best = (measure(mask), 0, mask)
    for count in sorted(
        {min(2**i, len(promising)) for i in range(len(promising).bit_length() + 1)} - {0}
    ):
        other = mask.copy()
        for _, drop, add in promising[:count]:
            other[drop], other[add] = False, True
        best = min(best, (measure(other), count, other), key=lambda found: found[0])
    return best[1], best[2], best[0]


def _evenly_spaced(
    sizes: Sequence[tuple[int, int]], predictors: Sequence[str]
) -> Iterator[Candidate]:
    for steps, count in sizes:
        interval = -(-steps // count)
        for predictor in predictors if steps > count else predictors[:1]:
            yield Candidate(
                steps, warped(steps, count, 1.0, min(interval - 1, steps - count)), predictor
            )


def _warped_variants(finalist: Candidate) -> Iterator[Candidate]:
    count, steps = len(finalist.computed), finalist.steps
    tail = steps - 1 - finalist.computed[-1]
    for shorter in sorted({0, tail // 2, tail}):
        for warp in (1.0, *WARPS):
            yield replace(finalist, computed=warped(steps, count, warp, shorter))


def _moved(candidate: Candidate, index: int, stride: int) -> Iterator[Candidate]:
    """A computed step moved one way and the other, where there is room."""
    computed = candidate.computed
    after = computed[index + 1] if index + 1 < len(computed) else candidate.steps
    for place in (computed[index] - stride, computed[index] + stride):
        if computed[index - 1] < place < after:
            yield replace(candidate, computed=(*computed[:index], place, *computed[index + 1 :]))


def sizes_for(count_at: Callable[[int], int], fixed: int | None) -> list[tuple[int, int]]:
    """(steps, computed steps) to try.

    Args:
        count_at: how many steps the budget lets compute where there are so many in all.
        fixed: the only step count to try; without it, multiples of what is computed.

    Raises:
        UsageError: the budget pays for no computed step.
    """
    if fixed is not None:
        step_counts = [fixed]
    else:
        most = min(max(count_at(1), 1), MAX_STEPS)
        step_counts = [most * interval for interval in INTERVALS if most * interval <= MAX_STEPS]
    sizes = [(steps, min(count_at(steps), steps)) for steps in step_counts]
    sizes = [(steps, count) for steps, count in sizes if count >= 1]
    if not sizes:
        raise UsageError("the budget pays for no computed step; raise it")
    return sizes
