"""Search: the number of steps, the computed ones and the correction, chosen together.

A collapsed step costs about a hundredth of a full one, so the best
use of a few computed steps is often many more steps than that. Candidates are judged by what they
are for: the relative L2 distance of their final latents to a converged solution (many steps, all
computed) on a few calibration images. The search is a fixed sequence of trials, so the same images
lead to the same schedule:

    even spacing, every (step count, correction)
    ->  denser early or late
    ->  single computed steps moved
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from goc_deploy.errors import UsageError
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec

INTERVALS = (1, 2, 3, 4, 5, 6, 8, 10)
WARPS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)
PARTS, DENSER = 3, (2.0, 2.0**0.5)
FINALISTS = 3
MAX_SEARCHED_STEPS = 400

Measure = Callable[["Candidate"], float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that computes whole steps.

    Attributes:
        steps: sampling steps T.
        computed: the steps that compute every unit, rising, the first is 0.
        correction: the correction part of a SPEC, such as ``lagrange:2``.
    """

    steps: int
    computed: tuple[int, ...]
    correction: str

    def plain(self, spec: ModelSpec) -> Schedule:
        """The candidate for a model, with plain reuse instead of its correction."""
        return plain([[k in self.computed] * spec.units for k in range(self.steps)], spec)


def plain(mask: Iterable[Iterable[bool]], spec: ModelSpec) -> Schedule:
    """The schedule that computes the units of ``mask`` [T][U] and plainly reuses the others."""
    rows = tuple(tuple(COMPUTE if computed else REUSE for computed in step) for step in mask)
    return Schedule.of(spec, rows)


def uncached(spec: ModelSpec, steps: int) -> Schedule:
    """Every unit computed at every step."""
    return Schedule.of(spec, ((COMPUTE,) * spec.units,) * steps)


def warped(steps: int, count: int, warp: float, tail: int) -> tuple[int, ...]:
    """``count`` computed steps of ``steps``, the last ``tail`` predicted.

    ``warp`` above 1 is denser early, below 1 late. Steps that round to one place move apart.
    """
    last = steps - 1 - tail
    return _apart([round(last * (i / max(count - 1, 1)) ** warp) for i in range(count)], steps)


def spread(steps: int, count: int, densities: Sequence[float], tail: int) -> tuple[int, ...]:
    """``count`` computed steps of ``steps``, the last ``tail`` predicted.

    Parts of equal length have computed steps in proportion to their densities. Steps that round to
    one place move apart.
    """
    part, whole = (steps - 1 - tail) / len(densities), sum(densities)
    places = []
    for i in range(count):
        left, start = i / max(count - 1, 1) * whole, 0.0
        for density in densities:
            share = min(left, density)
            start, left = start + part * share / density, left - share
        places.append(round(start))
    return _apart(places, steps)


def _apart(places: list[int], steps: int) -> tuple[int, ...]:
    """Move rising places apart that are equal, within ``steps``."""
    count = len(places)
    for i in range(1, count):
        places[i] = max(places[i], places[i - 1] + 1)
    for i in reversed(range(count)):
        places[i] = min(places[i], steps - count + i)
    return tuple(places)


def search(
    sizes: Sequence[tuple[int, int]], corrections: Sequence[str], measure: Measure
) -> list[tuple[float, Candidate]]:
    """Try candidates.

    Args:
        sizes: (steps T, computed steps) to try.
        corrections: corrections to try.
        measure: the error of a candidate; called once for each.

    Returns:
        (error, candidate) of everything tried, best first.
    """
    tried: dict[Candidate, float] = {}

    def attempt(candidates: Iterable[Candidate]) -> list[Candidate]:
        for candidate in candidates:
            if candidate not in tried:
                tried[candidate] = measure(candidate)
        return sorted(tried, key=lambda c: (tried[c], c.steps, c.computed, c.correction))

    best = attempt(_evenly_spaced(sizes, corrections))
    best = attempt(c for finalist in best[:FINALISTS] for c in _warped_variants(finalist))
    for stride in (2, 1):
        for i in range(1, len(best[0].computed)):
            best = attempt(_moved(best[0], i, stride))
    return [(tried[candidate], candidate) for candidate in best]


def search_by_exchange(
    sizes: Sequence[tuple[int, int]], correction: str, measure: Measure, limit: int
) -> list[tuple[float, Candidate]]:
    """Try even spacing, then other densities, then move runs of neighbouring computed steps by one.

    The steps are divided into thirds, some of which become denser: first twice as dense, then by
    half of that. Moves alone would stop near the even spacing, because one step that moves leaves a
    gap beside it.

    Long runs move before short ones and single steps. Of each length the last run moves first. A
    move stays if it lowers the error. The search ends if no move does, or after ``limit`` trials.

    Args:
        sizes: (steps T, computed steps) to try.
        correction: the correction to try.
        measure: the error of a candidate; called once for each.
        limit: largest number of trials.

    Returns:
        (error, candidate) of everything tried, best first.
    """
    tried: dict[Candidate, float] = {}

    def attempt(candidates: Iterable[Candidate]) -> Candidate:
        for candidate in candidates:
            if candidate not in tried and len(tried) < limit:
                tried[candidate] = measure(candidate)
        return min(tried, key=_place)

    def _place(candidate: Candidate) -> tuple[float, int, tuple[int, ...]]:
        return tried[candidate], candidate.steps, candidate.computed

    best = attempt(_evenly_spaced(sizes, (correction,)))
    densities: tuple[float, ...] = (1.0,) * PARTS
    for factor in DENSER:
        denser = dict(_denser(best, densities, factor))
        best = attempt(denser)
        densities = denser.get(best, densities)
    before, count = None, len(best.computed)
    while best != before:
        before, length = best, max(1, (count - 1) // 2)
        while length:
            for i in reversed(range(1, count - length + 1)):
                best = attempt(_moved(best, i, 1, length))
            length //= 2
    return [(tried[candidate], candidate) for candidate in sorted(tried, key=_place)]


def _evenly_spaced(
    sizes: Sequence[tuple[int, int]], corrections: Sequence[str]
) -> Iterator[Candidate]:
    for steps, count in sizes:
        interval = -(-steps // count)
        for correction in corrections if steps > count else corrections[:1]:
            yield Candidate(
                steps, warped(steps, count, 1.0, min(interval - 1, steps - count)), correction
            )


def _warped_variants(finalist: Candidate) -> Iterator[Candidate]:
    count, steps = len(finalist.computed), finalist.steps
    tail = steps - 1 - finalist.computed[-1]
    for shorter in sorted({0, tail // 2, tail}):
        for warp in (1.0, *WARPS):
            yield replace(finalist, computed=warped(steps, count, warp, shorter))


def _denser(
    candidate: Candidate, densities: tuple[float, ...], factor: float
) -> Iterator[tuple[Candidate, tuple[float, ...]]]:
    """Candidates with some of the parts denser by a factor, and their densities."""
    count, tail = len(candidate.computed), candidate.steps - 1 - candidate.computed[-1]
    for chosen in product((False, True), repeat=PARTS):
        if any(chosen) and not all(chosen):
            changed = tuple(
                density * factor if is_chosen else density
                for density, is_chosen in zip(densities, chosen, strict=True)
            )
            computed = spread(candidate.steps, count, changed, tail)
            yield replace(candidate, computed=computed), changed


def _moved(candidate: Candidate, index: int, stride: int, length: int = 1) -> Iterator[Candidate]:
    """A run of computed steps moved one way and the other, where there is room."""
    computed, end = candidate.computed, index + length
    after = computed[end] if end < len(computed) else candidate.steps
    for move in (-stride, stride):
        run = tuple(step + move for step in computed[index:end])
        if computed[index - 1] < run[0] and run[-1] < after:
            yield replace(candidate, computed=(*computed[:index], *run, *computed[end:]))


def sizes_for(
    count_at: Callable[[int], int], fixed: int | None, intervals: Sequence[int] = INTERVALS
) -> list[tuple[int, int]]:
    """(steps, computed steps) to try.

    Args:
        count_at: how many steps the budget allows to compute, by the number of steps.
        fixed: the only step count to try; without it, multiples of what is computed.
        intervals: these multiples.

    Raises:
        UsageError: the budget pays for no computed step.
    """
    if fixed is not None:
        step_counts = [fixed]
    else:
        most = min(max(count_at(1), 1), MAX_SEARCHED_STEPS)
        step_counts = [most * n for n in intervals if most * n <= MAX_SEARCHED_STEPS]
    sizes = [(steps, min(count_at(steps), steps)) for steps in step_counts]
    sizes = [(steps, count) for steps, count in sizes if count >= 1]
    if not sizes:
        raise UsageError("the budget pays for no computed step; raise it")
    return sizes
