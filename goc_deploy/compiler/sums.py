"""The passes of the form ``sums``: computed features are added to sums of later steps at once.

The gates and coefficients of all steps are known when a step runs. So a feature can be weighted
for every later prediction that reads it, and added to the sum of that prediction, before the next
unit runs. No feature is kept for each unit; only the sums that later steps still add are kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import groupby

from goc_deploy.blocks import ALL_STREAMS, TokenStream
from goc_deploy.compiler.plan import MAX_TAPS, Accumulate, AddSum, Compute, Launch, Tap
from goc_deploy.compiler.values import Evaluation
from goc_deploy.errors import UsageError

MAX_READS = 64  # features in one prediction; compiling takes seconds beyond it, and saves nothing


@dataclass(frozen=True, slots=True)
class Sum:
    """The predictions of a run of adjacent features, which their step adds to their stream.

    Attributes:
        step: the step.
        feature: index of the first feature.
        features: number of features.
        stream: their stream.
    """

    step: int
    feature: int
    features: int
    stream: TokenStream


@dataclass(frozen=True, slots=True)
class Computed:
    """One computed unit and the sums that its features are added to.

    Attributes:
        step: the step that computes it.
        unit: index of the unit.
        features: index and stream of each feature.
        weights: for each feature, each sum and the coefficient of the feature in it, in the order
            of the steps.
    """

    step: int
    unit: int
    features: tuple[tuple[int, TokenStream], ...]
    weights: tuple[tuple[tuple[Sum, float], ...], ...]


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
        expanded.append(replace(e, reads=reads, coefficients=weights, value=None))
    return expanded


def push_features(evaluations: list[Evaluation]) -> list[Computed | Sum]:
    """Turn predictions around: from what they read to where each computed feature goes.

    Before: step 4 computes units 0 and 1; step 5 predicts both, each from the feature of step 4;
    step 6 predicts unit 1 from it. After: step 4 computes unit 0 and adds it to the sum of step 5,
    then computes unit 1 and adds it to the sums of steps 5 and 6. Each step adds its sum where the
    units are predicted.
    """
    pushed: list[list[Evaluation] | Sum] = []
    weights: dict[int | None, list[tuple[Sum, float]]] = defaultdict(list)
    for (step, unit), entries in groupby(evaluations, key=_launch):
        run = list(entries)
        if unit is not None:
            pushed.append(run)
            continue
        for stream in ALL_STREAMS:
            predicted = [e for e in run if e.stream == stream]
            if not predicted:
                continue
            target = Sum(step, predicted[0].feature, len(predicted), stream)
            pushed.append(target)
            for e in predicted:
                for value, weight in zip(e.reads, e.coefficients, strict=True):
                    weights[value].append((target, weight))
    return [event if isinstance(event, Sum) else _computed(event, weights) for event in pushed]


def _launch(e: Evaluation) -> tuple[int, int | None]:
    return e.step, None if e.reads else e.unit


def _computed(
    run: list[Evaluation], weights: Mapping[int | None, Sequence[tuple[Sum, float]]]
) -> Computed:
    """The computed unit whose features these are."""
    return Computed(
        run[0].step,
        run[0].unit,
        tuple((e.feature, e.stream) for e in run),
        tuple(tuple(weights.get(e.value, ())) for e in run),
    )


def assign_accumulators(
    events: list[Computed | Sum],
) -> tuple[tuple[tuple[Launch, ...], ...], Counter[TokenStream]]:
    """Assign an accumulator of its stream to every sum, from its first feature until it is added.

    The computed features that are added to sums go through the same slots, one for each feature of
    a unit, which are free as soon as the launches after the unit have run.

    Before: features of step 0 go to the sums of steps 1 and 3, features of step 2 to those of steps
    3 and 5. After: step 0 starts accumulators 0 and 1; step 2 adds to 1, and starts 0, which is
    free since step 1.

    Returns:
        (launches by step, number of slots of each stream).
    """
    holder: dict[Sum, int] = {}
    free: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
    accumulators: Counter[TokenStream] = Counter()
    slots: Counter[TokenStream] = Counter()
    steps: dict[int, list[Launch]] = defaultdict(list)
    for event in events:
        ops = steps[event.step]
        if isinstance(event, Sum):
            accumulator = holder.pop(event)
            heappush(free[event.stream], accumulator)
            ops.append(AddSum(accumulator, event.feature, event.features, event.stream))
            continue
        used: Counter[TokenStream] = Counter()
        stores: list[int | None] = []
        additions: list[Launch] = []
        for (feature, stream), weights in zip(event.features, event.weights, strict=True):
            stores.append(used[stream] if weights else None)
            added: list[Tap] = []
            started: list[Tap] = []
            for target, weight in weights:
                starts = target not in holder
                if starts and free[stream]:
                    holder[target] = heappop(free[stream])
                elif starts:
                    holder[target] = accumulators[stream]
                    accumulators[stream] += 1
                tap = Tap(holder[target], target.step - event.step, weight, starts)
                (started if starts else added).append(tap)
            taps = added + started
            additions += [
                Accumulate(feature, used[stream], tuple(taps[first : first + MAX_TAPS]), stream)
                for first in range(0, len(taps), MAX_TAPS)
            ]
            used[stream] += bool(weights)
        ops += [Compute(event.unit, tuple(stores)), *additions]
        slots |= used
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots
