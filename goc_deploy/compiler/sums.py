"""The passes of the form ``sums``: computed features are added to sums of later steps at once.

The gates and coefficients of all steps are known when a step runs. So a feature can be weighted
for every later prediction that reads it, and added to the sum of that prediction, before the next
unit runs. No feature is kept for each unit; only the sums that later steps still add are kept.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby

from goc_deploy.compiler.plan import MAX_TAPS, Accumulate, AddSum, Compute, Launch, Tap
from goc_deploy.compiler.values import Evaluation
from goc_deploy.errors import UsageError

MAX_READS = 64  # features in one prediction; compiling takes seconds beyond it, and saves nothing


@dataclass(frozen=True, slots=True)
class Sum:
    """The predictions of a run of adjacent units, which their step adds to x.

    Attributes:
        step: the step.
        unit: index of the first unit.
        units: number of units.
    """

    step: int
    unit: int
    units: int


@dataclass(frozen=True, slots=True)
class Computed:
    """One computed feature and the sums that it is added to.

    Attributes:
        step: the step that computes it.
        unit: index of the unit.
        weights: each sum and the coefficient of the feature in it, in the order of the steps.
    """

    step: int
    unit: int
    weights: tuple[tuple[Sum, float], ...]


def expand_history(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Make every prediction read computed features only, with its whole coefficients.

    A prediction that is in the history is replaced by what it was made of. With the history
    ``used``, predictions from two or more entries then read the features of all earlier computed
    steps.

    Before: step 3 predicts ``2.2 a - 1.2 b``, and b was predicted as ``1.5 c - 0.5 d``. After: step
    3 predicts ``2.2 a - 1.8 c + 0.6 d``.

    Raises:
        UsageError: a prediction would read more than ``MAX_READS`` features.
    """
    parts: dict[int, dict[int, float]] = {}  # value -> the computed values in it
    expanded: list[Evaluation] = []
    for index, e in enumerate(evaluations):
        if not e.reads:
            parts[index] = {index: 1.0}
            expanded.append(e)
            continue
        whole, *others = e.coefficients
        total: dict[int, float] = defaultdict(float)
        for value, coefficient in zip(e.reads, (1.0, *others), strict=True):
            for computed, weight in parts[value].items():
                total[computed] += coefficient * weight
        if len(total) > MAX_READS:
            raise UsageError(
                f"with sums, step {e.step} would read the features of {len(total)} earlier steps, "
                f"more than {MAX_READS}; use history=computed in the SPEC, or keep features"
            )
        parts[index] = dict(total)
        reads = tuple(sorted(total))
        weights = tuple(whole * total[value] for value in reads)
        expanded.append(Evaluation(e.step, e.unit, reads, weights, None))
    return expanded


def push_features(evaluations: list[Evaluation]) -> list[Computed | Sum]:
    """Turn predictions around: from what they read to where each computed feature goes.

    Before: step 4 computes units 0 and 1; step 5 predicts both, each from the feature of step 4;
    step 6 predicts unit 1 from it. After: step 4 computes unit 0 and adds it to the sum of step 5,
    then computes unit 1 and adds it to the sums of steps 5 and 6. Each step adds its sum where the
    units are predicted.
    """
    pushed: list[tuple[int, Evaluation] | Sum] = []
    weights: dict[int, list[tuple[Sum, float]]] = defaultdict(list)
    runs = groupby(enumerate(evaluations), key=lambda entry: (entry[1].step, bool(entry[1].reads)))
    for (step, predicted), entries in runs:
        run = list(entries)
        if not predicted:
            pushed += run
            continue
        target = Sum(step, run[0][1].unit, len(run))
        pushed.append(target)
        for _, e in run:
            for value, weight in zip(e.reads, e.coefficients, strict=True):
                weights[value].append((target, weight))
    return [
        event
        if isinstance(event, Sum)
        else Computed(event[1].step, event[1].unit, tuple(weights[event[0]]))
        for event in pushed
    ]


def assign_accumulators(
    events: list[Computed | Sum],
) -> tuple[tuple[tuple[Launch, ...], ...], int]:
    """Assign an accumulator to every sum, from its first feature until its step adds it.

    Every computed feature that is added to a sum goes through the same slot, which is free as soon
    as the launches after its unit have run.

    Before: features of step 0 go to the sums of steps 1 and 3, features of step 2 to those of steps
    3 and 5. After: step 0 starts accumulators 0 and 1; step 2 adds to 1, and starts 0, which is
    free since step 1.

    Returns:
        (launches by step, number of slots).
    """
    holder: dict[Sum, int] = {}
    free: list[int] = []
    accumulators = 0
    steps: dict[int, list[Launch]] = defaultdict(list)
    for event in events:
        ops = steps[event.step]
        if isinstance(event, Sum):
            accumulator = holder.pop(event)
            heappush(free, accumulator)
            ops.append(AddSum(accumulator, event.unit, event.units))
            continue
        ops.append(Compute(event.unit, 0 if event.weights else None))
        added: list[Tap] = []
        started: list[Tap] = []
        for target, weight in event.weights:
            starts = target not in holder
            if starts and free:
                holder[target] = heappop(free)
            elif starts:
                holder[target], accumulators = accumulators, accumulators + 1
            tap = Tap(holder[target], target.step - event.step, weight, starts)
            (started if starts else added).append(tap)
        taps = added + started
        ops += [
            Accumulate(event.unit, 0, tuple(taps[first : first + MAX_TAPS]))
            for first in range(0, len(taps), MAX_TAPS)
        ]
    slots = int(any(isinstance(event, Computed) and event.weights for event in events))
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots
