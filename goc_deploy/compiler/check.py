"""The check that a plan is safe to execute for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from goc_deploy.blocks import ALL_STREAMS, TokenStream
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
from goc_deploy.compiler.values import features_of_units
from goc_deploy.errors import EngineDirError
from goc_deploy.samplers import MAX_LAGS, sampler_misfit, switch_step
from goc_deploy.samplers.table import MAX_REACH
from goc_deploy.schedule import MAX_HISTORY
from goc_deploy.spec import ModelSpec


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Check that a plan is safe to execute for this model.

    Every feature of the image acts once in every step and in order, or through an accumulator that
    is filled in earlier steps and added once, or all act as one through their residual. Features of
    other streams act before each computed unit that reads them. Slots are in range, and nothing is
    read before it is written. The second set of weights of a model begins where the sampler says,
    and reads nothing that was written before.

    Raises:
        EngineDirError: naming the step and what is wrong.
    """
    if plan.sampler.steps != plan.steps or not plan.steps:
        raise EngineDirError(
            f"plan {plan.name}: {plan.steps} steps but a sampler table of {plan.sampler.steps}"
        )
    _check_table(plan, spec)
    _check_head(plan, spec)
    of_image = [i for i, place in enumerate(spec.features) if place.feature.stream == "image"]
    written: set[_Slot] = set()
    before_switch: set[_Slot] = set()
    accumulated: dict[int, list[int]] = {}  # target step -> features of the image
    units, sums = features_of_units(spec), SumsCheck(plan, spec)
    read = _read_before(spec)
    for step, launches in enumerate(plan.launches):
        acted: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
        order = acted["image"]
        if step == plan.schedule.switch:
            if accumulated or sums.targets:
                raise EngineDirError(
                    f"plan {plan.name}: predictions by the first set of weights are left for step "
                    f"{step}, where the second begins, or later"
                )
            before_switch, written = written, set()
        for op in launches:
            sums.check_form(step, op)
            if isinstance(op, Accumulate):
                sums.accumulate(step, op)
                continue
            if isinstance(op, AddSum):
                acted[op.stream].extend(sums.added(step, op))
                continue
            if isinstance(op, Collect):
                order += _collected(plan, step, op, accumulated, of_image)
                continue
            _check_level(plan, step, op, whole=order == of_image)
            if isinstance(op, Residual):
                _check_launch(plan, step, (_image(Prediction((), (), op.store)),), written)
                continue
            entries = _entries(plan, step, op, spec, units)
            if isinstance(op, Compute):
                sums.computed(step, op)
                late = [s for s, features in read[op.unit].items() if acted[s] != features]
                if late:
                    raise EngineDirError(
                        f"plan {plan.name}: step {step} computes {spec.unit_names[op.unit]}, which "
                        f"reads the {late[0]}, without all earlier features of the {late[0]}"
                    )
            _check_launch(plan, step, entries, written)
            target = step + (op.ahead if isinstance(op, Predict) else 0)
            if not step <= target < plan.steps:
                raise EngineDirError(
                    f"plan {plan.name}: step {step} predicts for step {target}, "
                    "which does not exist"
                )
            if plan.schedule.level == "residual" and isinstance(op, Predict):
                order += of_image
                continue
            of_op = order if target == step else accumulated.setdefault(target, [])
            for entry in entries:
                (of_op if entry.stream == "image" else acted[entry.stream]).append(entry.feature)
        if order != of_image or any(acted[s] != sorted(set(acted[s])) for s in ALL_STREAMS):
            raise EngineDirError(
                f"plan {plan.name}: step {step} does not run each of the {spec.units} units once, "
                "in order"
            )
    sums.check_empty()
    if accumulated:
        raise EngineDirError(
            f"plan {plan.name}: what was accumulated for step {min(accumulated)} is never added"
        )
    slots = sum(map(plan.slots_of, ALL_STREAMS))
    if slots > len(before_switch | written):
        raise EngineDirError(
            f"plan {plan.name}: it asks for {slots} slots but stores into "
            f"{len(before_switch | written)}"
        )


_Slot = tuple[TokenStream, int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a launch reads and stores of a feature, of which it knows the stream."""

    feature: int
    stream: TokenStream
    prediction: Prediction


def _image(prediction: Prediction) -> _Entry:
    return _Entry(0, "image", prediction)


def _read_before(spec: ModelSpec) -> list[Mapping[TokenStream, list[int]]]:
    """For each unit and stream that it reads, the features that must be added before it.

    Those of the image are left out, because every step adds all of them in order.
    """
    read: list[Mapping[TokenStream, list[int]]] = []
    earlier: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
    for unit, features in zip(spec.declared_units, features_of_units(spec), strict=True):
        read.append({s: list(earlier[s]) for s in unit.reads if s != "image"})
        for feature, stream in features:
            earlier[stream].append(feature)
    return read


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
    if isinstance(op, Predict) and (op.feature, len(op.predictions), op.ahead) != (0, 1, 0):
        raise EngineDirError(f"{where} must predict the residual, once and in the step itself")
    stores = op.stores if isinstance(op, Segment | Compute) else ()
    if any(store is not None for store in stores):
        raise EngineDirError(f"{where} stores features, but its schedule predicts the residual")


def _entries(
    plan: Plan,
    step: int,
    op: Compute | Segment | Predict,
    spec: ModelSpec,
    units: Sequence[Sequence[tuple[int, TokenStream]]],
) -> tuple[_Entry, ...]:
    """Return what a launch reads and stores of each feature.

    Raises:
        EngineDirError: the model has no such unit or feature, or it has another stream or number of
            features.
    """
    if isinstance(op, Predict):
        features = range(op.feature, op.feature + len(op.predictions))
        places = spec.features[op.feature : features.stop]
        if len(places) < len(features) or any(p.feature.stream != op.stream for p in places):
            raise EngineDirError(
                f"plan {plan.name}: step {step} predicts features {features.start} to "
                f"{features.stop - 1} of the {op.stream}, which the model does not have"
            )
        pairs = zip(features, op.predictions, strict=True)
        return tuple(_Entry(feature, op.stream, prediction) for feature, prediction in pairs)
    computed = list(
        chain.from_iterable(units if isinstance(op, Segment) else units[op.unit : op.unit + 1])
    )
    if len(computed) != len(op.stores):
        raise EngineDirError(
            f"plan {plan.name}: step {step} has {len(op.stores)} slots for the "
            f"{len(computed)} features that it computes"
        )
    return tuple(
        _Entry(feature, stream, Prediction((), (), store))
        for (feature, stream), store in zip(computed, op.stores, strict=True)
    )


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
    if plan.schedule.switch != switch_step(table, spec):
        raise EngineDirError(
            f"plan {plan.name}: its schedule and its sampler differ in the step at which a second "
            "set of weights begins; add the plan again"
        )


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
    plan: Plan, step: int, op: Collect, accumulated: dict[int, list[int]], every: list[int]
) -> list[int]:
    """Return the features whose predictions the accumulator of a collapsed step holds: all.

    Raises:
        EngineDirError: features are missing, or were predicted in another step than ``ahead``
            before.
    """
    launches = plan.launches[step - op.ahead] if 0 < op.ahead <= step else ()
    filled = [
        feature
        for filling in launches
        if isinstance(filling, Predict) and filling.ahead == op.ahead
        for feature in range(filling.feature, filling.feature + len(filling.predictions))
    ]
    if filled != every or accumulated.pop(step, None) != every or len(plan.launches[step]) != 1:
        raise EngineDirError(
            f"plan {plan.name}: step {step} adds an accumulator that does not hold each of the "
            f"{len(every)} units once"
        )
    return filled


def _check_launch(plan: Plan, step: int, entries: tuple[_Entry, ...], written: set[_Slot]) -> None:
    stores: list[_Slot] = []
    for stream, entry in ((entry.stream, entry.prediction) for entry in entries):
        used = [*entry.slots, *([] if entry.store is None else [entry.store])]
        slots = plan.slots_of(stream)
        if any(not 0 <= slot < slots for slot in used):
            raise EngineDirError(
                f"plan {plan.name}: step {step} uses a slot outside 0..{slots - 1}"
            )
        if len(entry.slots) != len(entry.coefficients) or len(entry.slots) > MAX_HISTORY:
            raise EngineDirError(
                f"plan {plan.name}: step {step} has {len(entry.coefficients)} coefficients for "
                f"{len(entry.slots)} slots"
            )
        if not written.issuperset((stream, slot) for slot in entry.slots):
            raise EngineDirError(
                f"plan {plan.name}: step {step} reads a slot before anything is stored in it"
            )
        if entry.store is not None:
            stores.append((stream, entry.store))
    for index, (stream, store) in enumerate(stores):
        readers = sum(
            store in entry.prediction.slots
            for entry in entries
            if entry.stream == stream and entry.prediction.store != store
        )
        if readers or (stream, store) in stores[:index]:
            raise EngineDirError(
                f"plan {plan.name}: step {step} overwrites slot {store} while the same launch "
                "uses it"
            )
    written.update(stores)
