"""The check that a plan is safe to execute for a model."""

from __future__ import annotations

import math

from goc_deploy.compiler.check_sums import SumsCheck
from goc_deploy.compiler.plan import (
    Accumulate,
    AddSum,
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Residual,
    Segment,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.samplers import MAX_LAGS, sampler_misfit
from goc_deploy.samplers.table import MAX_REACH
from goc_deploy.schedule import MAX_HISTORY
from goc_deploy.spec import ModelSpec


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Check that a plan is safe to execute for this model.

    Every unit acts once in every step and in order, or through an accumulator that is filled in
    earlier steps and added once, or all units act as one through their residual. Slots are in
    range, and nothing is read before it is written.

    Raises:
        EngineDirError: naming the step and what is wrong.
    """
    if plan.sampler.steps != plan.steps or not plan.steps:
        raise EngineDirError(
            f"plan {plan.name}: {plan.steps} steps but a sampler table of {plan.sampler.steps}"
        )
    _check_table(plan, spec)
    _check_head(plan, spec)
    every_unit = list(range(spec.units))
    written: set[int] = set()
    accumulated: dict[int, list[int]] = {}  # target step -> units
    sums = SumsCheck(plan)
    for step, launches in enumerate(plan.launches):
        order: list[int] = []
        for op in launches:
            sums.check_form(step, op)
            if isinstance(op, Accumulate):
                sums.accumulate(step, op)
                continue
            if isinstance(op, AddSum):
                order += sums.added(step, op)
                continue
            if isinstance(op, Compute):
                sums.computed(step, op)
            if isinstance(op, Collect):
                order += _collected(plan, step, op, accumulated, every_unit)
                continue
            _check_level(plan, step, op, whole=order == every_unit)
            if isinstance(op, Residual):
                _check_launch(plan, step, (Prediction((), (), op.store),), written)
                continue
            first, entries = _entries(op)
            target = step + (op.ahead if isinstance(op, Predict) else 0)
            if not step <= target < plan.steps:
                raise EngineDirError(
                    f"plan {plan.name}: step {step} predicts for step {target}, "
                    "which does not exist"
                )
            units = order if target == step else accumulated.setdefault(target, [])
            whole = plan.schedule.level == "residual" and isinstance(op, Predict)
            units += every_unit if whole else range(first, first + len(entries))
            _check_launch(plan, step, entries, written)
        if order != every_unit:
            raise EngineDirError(
                f"plan {plan.name}: step {step} does not run each of the {spec.units} units once, "
                "in order"
            )
    sums.check_empty()
    if accumulated:
        raise EngineDirError(
            f"plan {plan.name}: what was accumulated for step {min(accumulated)} is never added"
        )
    if plan.slots > len(written):
        raise EngineDirError(
            f"plan {plan.name}: it asks for {plan.slots} slots but stores into {len(written)}"
        )


def _check_level(plan: Plan, step: int, op: Launch, *, whole: bool) -> None:
    """Check that a launch predicts or stores what the level of the schedule says.

    Args:
        plan: the plan.
        step: index of the step.
        op: the launch.
        whole: whether the launches before it in the step run every unit.

    Raises:
        EngineDirError: it does not.
    """
    where = f"plan {plan.name}: step {step}"
    if isinstance(op, Residual) and not whole:
        raise EngineDirError(f"{where} keeps the residual before it has run every unit")
    if plan.schedule.level == "unit":
        if isinstance(op, Residual):
            raise EngineDirError(f"{where} keeps the residual, but its schedule predicts by unit")
        return
    if isinstance(op, Predict) and (op.unit, len(op.predictions), op.ahead) != (0, 1, 0):
        raise EngineDirError(f"{where} must predict the residual, once and in the step itself")
    stores = op.stores if isinstance(op, Segment) else ()
    stores = (op.store,) if isinstance(op, Compute) else stores
    if any(store is not None for store in stores):
        raise EngineDirError(f"{where} stores features, but its schedule predicts the residual")


def _entries(op: Compute | Segment | Predict) -> tuple[int, tuple[Prediction, ...]]:
    """Return the first unit of a launch, and what the launch reads and stores per unit."""
    if isinstance(op, Predict):
        return op.unit, op.predictions
    first, stores = (op.unit, (op.store,)) if isinstance(op, Compute) else (0, op.stores)
    return first, tuple(Prediction((), (), store) for store in stores)


def _check_table(plan: Plan, spec: ModelSpec) -> None:
    table = plan.sampler
    columns = (
        table.latent,
        table.model,
        table.noise,
        table.spread,
        table.estimate,
        table.lag_coefficients,
    )
    if any(len(column) != table.steps for column in columns):
        raise EngineDirError(f"plan {plan.name}: the columns of its sampler table differ in length")
    if table.reach > MAX_REACH or any(len(row) != table.reach for row in table.lag_coefficients):
        raise EngineDirError(
            f"plan {plan.name}: its sampler must reach back the same 0 to {MAX_REACH} steps "
            "at every step"
        )
    if any(sum(map(bool, row)) > MAX_LAGS for row in table.lag_coefficients):
        raise EngineDirError(
            f"plan {plan.name}: its sampler reads more than {MAX_LAGS} earlier estimates in a step"
        )
    if table.lags and table.learned_variance:
        raise EngineDirError(
            f"plan {plan.name}: its sampler reads both earlier estimates and a learned variance"
        )
    misfit = sampler_misfit(table, spec)
    if misfit:
        raise EngineDirError(f"plan {plan.name}: {misfit}")


def _check_head(plan: Plan, spec: ModelSpec) -> None:
    head = plan.sampler.head
    if head is None:
        return
    needed = (plan.steps, head.form.width(spec), head.form.cell_values(spec))
    if head.shape != needed or len(head.weights) != 4 * math.prod(needed):
        raise EngineDirError(
            f"plan {plan.name}: the weights of its head have shape {list(head.shape)}, but its "
            f"form {head.form.signature} needs {list(needed)}"
        )


def _collected(
    plan: Plan, step: int, op: Collect, accumulated: dict[int, list[int]], every_unit: list[int]
) -> list[int]:
    """Return the units whose predictions the accumulator of a collapsed step holds: all units.

    Raises:
        EngineDirError: units are missing, or were predicted in another step than ``ahead`` before.
    """
    launches = plan.launches[step - op.ahead] if 0 < op.ahead <= step else ()
    filled = [
        unit
        for filling in launches
        if isinstance(filling, Predict) and filling.ahead == op.ahead
        for unit in range(filling.unit, filling.unit + len(filling.predictions))
    ]
    if (
        filled != every_unit
        or accumulated.pop(step, None) != every_unit
        or len(plan.launches[step]) != 1
    ):
        raise EngineDirError(
            f"plan {plan.name}: step {step} adds an accumulator that does not hold each of the "
            f"{len(every_unit)} units once"
        )
    return filled


def _check_launch(
    plan: Plan, step: int, entries: tuple[Prediction, ...], written: set[int]
) -> None:
    stores: list[int] = []
    for entry in entries:
        used = [*entry.slots, *([] if entry.store is None else [entry.store])]
        if any(not 0 <= slot < plan.slots for slot in used):
            raise EngineDirError(
                f"plan {plan.name}: step {step} uses a slot outside 0..{plan.slots - 1}"
            )
        if len(entry.slots) != len(entry.coefficients) or len(entry.slots) > MAX_HISTORY:
            raise EngineDirError(
                f"plan {plan.name}: step {step} has {len(entry.coefficients)} coefficients for "
                f"{len(entry.slots)} slots"
            )
        if not written.issuperset(entry.slots):
            raise EngineDirError(
                f"plan {plan.name}: step {step} reads a slot before anything is stored in it"
            )
        if entry.store is not None:
            stores.append(entry.store)
    for index, store in enumerate(stores):
        readers = sum(store in entry.slots for entry in entries if entry.store != store)
        if readers or store in stores[:index]:
            raise EngineDirError(
                f"plan {plan.name}: step {step} overwrites slot {store} while the same launch "
                "uses it"
            )
    written.update(stores)
