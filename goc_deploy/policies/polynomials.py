"""Predictors: coefficients over the features that a unit really computed, newest first.

Each is a polynomial through (or a Taylor expansion of) past features in the step index, so its coefficients are known
once the schedule is: see `goc_deploy.schedule.schedule.Schedule` for what a row of coefficients does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import factorial, prod

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number, whole_number
from goc_deploy.schedule import REUSE, Schedule

MAX_ORDER = 3
HERMITE_SIGMA = 0.5

Weight = Callable[
    [int, float], float
]  # (order i, steps since the newest feature) -> factor of the i-th derivative


def lagrange_row(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """Value at ``step`` of the polynomial through the features of the ``computed`` steps, newest first.

    Three steps 2 apart, one step on: ``(1.875, -1.25, 0.375)``.
    """
    return tuple(
        prod((step - other) / (own - other) for other in computed if other != own)
        for own in computed
    )


def taylor_row(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """Taylor expansion around the newest feature, derivatives by backward differences.

    Three steps 2 apart, one step on: ``(1.625, -0.75, 0.125)``.

    Source: TaylorSeer, "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", eq. 7.
    """
    return _expansion_row(
        computed, step, lambda order, distance: distance**order / factorial(order)
    )


def hermite_row(
    computed: Sequence[int], step: int, sigma: float = HERMITE_SIGMA
) -> tuple[float, ...]:
    """Like `taylor_row` with scaled Hermite polynomials instead of powers, which damps high orders.

    Three steps 2 apart, one step on, sigma 0.5: ``(1.21875, -0.1875, -0.03125)``.

    Source: HiCache, "Training-free Acceleration of Diffusion Models via Hermite Polynomial-based Feature Caching", eq. 8.
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


DEFAULT_ORDER = "2"

Row = Callable[
    [Sequence[int], int], tuple[float, ...]
]  # (computed steps, newest first; step) -> coefficients


def taylor(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``taylor[:ORDER]``: TaylorSeer."""
    return _over_computed(schedule, argument, context, taylor_row)


def lagrange(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``lagrange[:ORDER]``: the polynomial through the last ORDER + 1 computed features."""
    return _over_computed(schedule, argument, context, lagrange_row)


def hermite(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``hermite[:ORDER[:SIGMA]]``: HiCache."""
    order, _, sigma_text = argument.partition(":")
    sigma = number(sigma_text, "sigma") if sigma_text else HERMITE_SIGMA
    return _over_computed(
        schedule, order, context, lambda computed, step: hermite_row(computed, step, sigma)
    )


def _over_computed(
    schedule: Schedule, order_text: str, context: PolicyContext, row_of: Row
) -> Schedule:
    """Predict from the last ORDER + 1 features that were computed, or as many as there are."""
    order = whole_number(order_text or DEFAULT_ORDER, "order", 0, MAX_ORDER)
    if context.options.get("history", "computed") != "computed":
        raise UsageError("this predictor reads computed features only; leave out history=used")
    return predict_from_computed(schedule, order, row_of)


def predict_from_computed(schedule: Schedule, order: int, row_of: Row) -> Schedule:
    """Give every plainly reused evaluation the row of a predictor over the last ``order + 1`` computed features."""
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
