"""The evaluations of a schedule, which read and produce named values (static single assignment)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from goc_deploy.schedule import MAX_HISTORY, Schedule


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One unit at one step, which reads and produces named values instead of buffers.

    Attributes:
        step: the step whose x it updates.
        unit: index of the unit.
        reads: names of the values read, the one with the largest coefficient first; empty if the
            unit is computed.
        coefficients: one per value read, as in `goc_deploy.compiler.plan.Prediction`.
        value: name of the value it produces, or None if no evaluation reads that value.
        ahead: number of steps between the step in which it runs and ``step``.
    """

    step: int
    unit: int
    reads: tuple[int, ...]
    coefficients: tuple[float, ...]
    value: int | None
    ahead: int = 0


def name_values(schedule: Schedule) -> list[Evaluation]:
    """Name every feature that a schedule computes or predicts.

    A history entry is a value times a factor. A prediction from one entry only changes the factor.
    A prediction from several entries is a new value: their sum, divided by the largest coefficient,
    which becomes the factor. A value that is in the history twice is read once, with the sum of
    its coefficients.

    If the schedule's level is ``residual``, the residual of a step stands for its units, as unit 0.

    Before: ``gradient`` with history (a, a). After: the prediction *is* a.
    Before: ``2.2 a - 1.2 b``. After: the value ``a - 0.545 b``, times 2.2.
    """
    evaluations: list[Evaluation] = []
    histories: list[tuple[tuple[int, float], ...]] = [()] * schedule.units
    for step, rows in enumerate(schedule.feature_rows):
        for unit, row in enumerate(rows):
            weights: dict[int, float] = {}
            for (value, factor), coefficient in zip(histories[unit], row, strict=False):
                weights[value] = weights.get(value, 0.0) + coefficient * factor
            reads = tuple(sorted(weights, key=lambda value: -abs(weights[value])))
            whole = weights[reads[0]] if reads else 1.0
            coefficients = (
                (whole, *(weights[value] / whole if whole else 0.0 for value in reads[1:]))
                if reads
                else ()
            )
            new = len(evaluations) if len(reads) != 1 else None
            evaluations.append(Evaluation(step, unit, reads, coefficients, new))
            if not row or schedule.history == "used":
                pushed = reads[0] if new is None else new
                histories[unit] = ((pushed, whole), *histories[unit])[:MAX_HISTORY]
    return evaluations


def drop_dead_stores(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Drop the stores of values that no later evaluation reads.

    Before: step 2 stores a feature that step 4 replaces before any step reads it. After: step 2
    stores nothing.
    """
    alive: set[int] = set()
    kept: list[Evaluation] = []
    for e in reversed(evaluations):
        kept.append(e if e.value in alive else replace(e, value=None))
        alive.update(e.reads)
    return kept[::-1]
