"""The evaluations of a schedule, which read and produce named values (static single assignment)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from goc_deploy.blocks import TokenStream
from goc_deploy.schedule import MAX_HISTORY, Schedule
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One feature at one step, which reads and produces named values instead of buffers.

    Attributes:
        step: the step whose stream it updates.
        unit: index of the unit.
        feature: index of the feature.
        stream: stream of the feature.
        reads: names of the values read, the one with the largest coefficient first; empty if the
            feature is computed.
        coefficients: one per value read, as in `goc_deploy.compiler.plan.Prediction`.
        value: name of the value it produces, or None if no evaluation reads that value.
        ahead: number of steps between the step in which it runs and ``step``.
    """

    step: int
    unit: int
    feature: int
    stream: TokenStream
    reads: tuple[int, ...]
    coefficients: tuple[float, ...]
    value: int | None
    ahead: int = 0


def name_values(schedule: Schedule, spec: ModelSpec) -> list[Evaluation]:
    """Name every feature that a schedule computes or predicts, unit by unit.

    A history entry is a value times a factor. A prediction from one entry only changes the factor.
    A prediction from several entries is a new value: their sum, divided by the largest coefficient,
    which becomes the factor. A value that is in the history twice is read once, with the sum of
    its coefficients.

    If the schedule's level is ``residual``, the residual of a step stands for its units, as the
    feature of unit 0.

    Before: ``gradient`` with history (a, a). After: the prediction *is* a.
    Before: ``2.2 a - 1.2 b``. After: the value ``a - 0.545 b``, times 2.2.
    """
    evaluations: list[Evaluation] = []
    histories: list[tuple[tuple[int, float], ...]] = [()] * len(spec.features)
    by_unit = schedule.level == "unit"
    features = features_of_units(spec) if by_unit else (((0, "image"),),)
    order = [(unit, *one) for unit, of_unit in enumerate(features) for one in of_unit]
    for step, rows in enumerate(schedule.coefficients):
        for unit, feature, stream in order:
            row = rows[unit]
            weights: dict[int, float] = {}
            for (value, factor), coefficient in zip(histories[feature], row, strict=False):
                weights[value] = weights.get(value, 0.0) + coefficient * factor
            reads = tuple(sorted(weights, key=lambda value: -abs(weights[value])))
            whole = weights[reads[0]] if reads else 1.0
            coefficients = (
                (whole, *(weights[value] / whole if whole else 0.0 for value in reads[1:]))
                if reads
                else ()
            )
            new = len(evaluations) if len(reads) != 1 else None
            evaluations.append(Evaluation(step, unit, feature, stream, reads, coefficients, new))
            if not row or schedule.history == "used":
                pushed = reads[0] if new is None else new
                histories[feature] = ((pushed, whole), *histories[feature])[:MAX_HISTORY]
    return evaluations


@lru_cache(maxsize=64)
def features_of_units(spec: ModelSpec) -> tuple[tuple[tuple[int, TokenStream], ...], ...]:
    """For each unit, index and stream of its features."""
    features: list[list[tuple[int, TokenStream]]] = [[] for _ in range(spec.units)]
    for index, place in enumerate(spec.features):
        features[place.unit].append((index, place.feature.stream))
    return tuple(map(tuple, features))


def drop_dead(evaluations: list[Evaluation], spec: ModelSpec) -> list[Evaluation]:
    """Drop what nothing reads: the stores of values, and predictions of other streams.

    The final layer reads the image. A prediction of another stream is read by the units that its
    step computes afterwards. If none of them reads the stream, it is only needed if a later
    prediction reads its value.

    Before: step 2 stores a feature that step 4 replaces before any step reads it; step 3 computes
    no unit, and predicts features of the image and of the text. After: step 2 stores nothing; step
    3 predicts features of the image.
    """
    units = spec.declared_units
    read: set[tuple[int, TokenStream]] = set()  # by the units that a step computes
    alive: set[int] = set()
    kept: list[Evaluation] = []
    for e in reversed(evaluations):
        if not e.reads:
            read.update((e.step, stream) for stream in units[e.unit].reads)
        others_read = e.stream == "image" or (e.step, e.stream) in read
        if e.reads and not others_read and e.value not in alive:
            continue
        kept.append(e if e.value in alive else replace(e, value=None))
        alive.update(e.reads)
    return kept[::-1]
