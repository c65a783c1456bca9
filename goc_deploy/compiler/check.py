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
    _LaunchesCheck(plan, spec).check()


_Slot = tuple[TokenStream, int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a launch reads and stores of a feature, of which it knows the stream."""

    feature: int
    stream: TokenStream
    prediction: Prediction


class _LaunchesCheck:
    """The check of the launches of all steps, in order."""

    def __init__(self, plan: Plan, spec: ModelSpec) -> None:
        self._plan, self._spec = plan, spec
        self._units, self._read = features_of_units(spec), _read_before(spec)
        places = enumerate(spec.features)
        self._of_image = [i for i, place in places if place.feature.stream == "image"]
        self._sums = SumsCheck(plan, spec)
        self._written: set[_Slot] = set()
        self._before_switch: set[_Slot] = set()
        self._accumulated: dict[int, list[int]] = {}  # target step -> features of the image

    def check(self) -> None:
        """Check all steps.

        Raises:
            EngineDirError: naming the step and what is wrong.
        """
        plan = self._plan
        for step, launches in enumerate(plan.launches):
            if step == plan.schedule.switch:
                self._switch(step)
            acted: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
            for op in launches:
                self._launch(step, op, acted)
            in_order = all(acted[s] == sorted(set(acted[s])) for s in ALL_STREAMS)
            if acted["image"] != self._of_image or not in_order:
                raise EngineDirError(
                    f"plan {plan.name}: step {step} does not run each of the {self._spec.units} "
                    "units once, in order"
                )
        self._sums.check_empty()
        if self._accumulated:
            raise EngineDirError(
                f"plan {plan.name}: what was accumulated for step {min(self._accumulated)} is "
                "never added"
            )
        slots, stored = sum(map(plan.slots_of, ALL_STREAMS)), self._before_switch | self._written
        if slots > len(stored):
            raise EngineDirError(
                f"plan {plan.name}: it asks for {slots} slots but stores into {len(stored)}"
            )

    def _switch(self, step: int) -> None:
        """Let nothing that the first set of weights wrote count as written from this step on."""
        if self._accumulated or self._sums.targets:
            raise EngineDirError(
                f"plan {self._plan.name}: predictions by the first set of weights are left for "
                f"step {step}, where the second begins, or later"
            )
        self._before_switch, self._written = self._written, set()

    def _launch(self, step: int, op: Launch, acted: dict[TokenStream, list[int]]) -> None:
        """Check a launch, and add the features that act in its step to ``acted``."""
        plan, order = self._plan, acted["image"]
        self._sums.check_form(step, op)
        if isinstance(op, Accumulate):
            self._sums.accumulate(step, op)
            return
        if isinstance(op, AddSum):
            acted[op.stream].extend(self._sums.added(step, op))
            return
        if isinstance(op, Collect):
            order += _collected(plan, step, op, self._accumulated, self._of_image)
            return
        _check_level(plan, step, op, whole=order == self._of_image)
        if isinstance(op, Residual):
            _check_launch(plan, step, (_image(Prediction((), (), op.store)),), self._written)
            return
        entries = _entries(plan, step, op, self._spec, self._units)
        if isinstance(op, Compute):
            self._sums.computed(step, op)
            self._check_read(step, op, acted)
        _check_launch(plan, step, entries, self._written)
        target = step + (op.ahead if isinstance(op, Predict) else 0)
        if not step <= target < plan.steps:
            raise EngineDirError(
                f"plan {plan.name}: step {step} predicts for step {target}, which does not exist"
            )
        if plan.schedule.level == "residual" and isinstance(op, Predict):
            order += self._of_image
            return
        of_op = order if target == step else self._accumulated.setdefault(target, [])
        for entry in entries:
            (of_op if entry.stream == "image" else acted[entry.stream]).append(entry.feature)

    def _check_read(
        self, step: int, op: Compute, acted: Mapping[TokenStream, Sequence[int]]
    ) -> None:
        """Check that all earlier features of the other streams that a unit reads have acted."""
        late = [s for s, features in self._read[op.unit].items() if acted[s] != features]
        if late:
            raise EngineDirError(
                f"plan {self._plan.name}: step {step} computes {self._spec.unit_names[op.unit]}, "
                f"which reads the {late[0]}, without all earlier features of the {late[0]}"
            )


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
