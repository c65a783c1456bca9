"""Polynomial corrections: coefficients over the features that a unit really computed, newest first.

Each is a polynomial through (or a Taylor expansion of) past features in the step index, so its
coefficients are known once the schedule is: see `goc_deploy.schedule.schedule.Schedule` for what a
row of coefficients does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import factorial, prod

from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import argument
from goc_deploy.schedule import MAX_HISTORY, REUSE, Schedule

HERMITE_SIGMA = 0.5

Weight = Callable[
    [int, float], float
]  # (order i, steps since the newest feature) -> factor of the i-th derivative


def lagrange_row(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """Value at ``step`` of the polynomial through the features of the ``computed`` steps.

    Newest first. Three steps 2 apart, one step on: ``(1.875, -1.25, 0.375)``.
    """
    return tuple(
        prod((step - other) / (own - other) for other in computed if other != own)
        for own in computed
    )


def taylor_row(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """Taylor expansion around the newest feature, derivatives by backward differences.

    Three steps 2 apart, one step on: ``(1.625, -0.75, 0.125)``.

    Source: TaylorSeer, "From Reusing to Forecasting: Accelerating Diffusion Models with
    TaylorSeers", eq. 7.
    """
    return _expansion_row(
        computed, step, lambda order, distance: distance**order / factorial(order)
    )


def hermite_row(
    computed: Sequence[int], step: int, sigma: float = HERMITE_SIGMA
) -> tuple[float, ...]:
    """Like `taylor_row` with scaled Hermite polynomials instead of powers, which damps high orders.

    Three steps 2 apart, one step on, sigma 0.5: ``(1.21875, -0.1875, -0.03125)``.

    Source: HiCache, "Training-free Acceleration of Diffusion Models via Hermite Polynomial-based
    Feature Caching", eq. 8.
    """
    return _expansion_row(
        computed,
        step,
        lambda order, distance: sigma**order * _hermite(order, sigma * distance) / factorial(order),
    )


def _expansion_row(computed: Sequence[int], step: int, weight: Weight) -> tuple[float, ...]:
    rows = [
        [float(i == j) for j in range(len(computed))] for i in range(len(computed))
    ]  # features themselves
    total = [0.0] * len(computed)
    for order in range(len(computed)):
        factor = weight(order, step - computed[0])
        total = [sum_ + factor * value for sum_, value in zip(total, rows[0], strict=True)]
        rows = [
            [
                (new - old) / (computed[i] - computed[i + 1])
                for new, old in zip(rows[i], rows[i + 1], strict=True)
            ]
            for i in range(len(rows) - 1)
        ]  # the next derivative at each feature but the oldest
    return tuple(total)


def _hermite(order: int, x: float) -> float:
    """Physicists' Hermite polynomial."""
    before, value = 0.0, 1.0
    for n in range(order):
        before, value = value, 2 * x * value - 2 * n * before
    return value


Row = Callable[
    [Sequence[int], int], tuple[float, ...]
]  # (computed steps, newest first; step) -> coefficients


@dataclass(frozen=True, slots=True)
class PolynomialOptions:
    """Options of `taylor` and `lagrange`."""

    order: int = argument(
        "Order of the polynomial, which reads ORDER + 1 features.",
        default=2,
        low=0,
        high=MAX_HISTORY - 1,
    )


@dataclass(frozen=True, slots=True)
class HermiteOptions(PolynomialOptions):
    """Options of `hermite`."""

    sigma: float = argument("Scale, which damps high orders.", default=HERMITE_SIGMA)


def taylor(schedule: Schedule, options: PolynomialOptions, _context: PolicyContext) -> Schedule:
    """``taylor``: TaylorSeer."""
    return predict_from_computed(schedule, options.order, taylor_row)


def lagrange(schedule: Schedule, options: PolynomialOptions, _context: PolicyContext) -> Schedule:
    """``lagrange``: the polynomial through the last ORDER + 1 computed features."""
    return predict_from_computed(schedule, options.order, lagrange_row)


def hermite(schedule: Schedule, options: HermiteOptions, _context: PolicyContext) -> Schedule:
    """``hermite``: HiCache."""
    return predict_from_computed(
        schedule,
        options.order,
        lambda computed, step: hermite_row(computed, step, options.sigma),
    )


def predict_from_computed(schedule: Schedule, order: int, row_of: Row) -> Schedule:
    """Predict every plainly reused evaluation from the last ``order + 1`` computed features.

    Fewer features are read where fewer were computed.
    """
    computed: list[list[int]] = [[] for _ in range(schedule.units)]  # newest first
    rows = []
    for step, actions in enumerate(schedule.coefficients):
        rows.append(
            tuple(
                row_of(computed[unit][: order + 1], step) if row == REUSE else row
                for unit, row in enumerate(actions)
            )
        )
        for unit, row in enumerate(actions):
            if not row:
                computed[unit].insert(0, step)
    return replace(schedule, coefficients=tuple(rows), history="computed")
