"""The plan: a schedule compiled for one model, sampler and step count. What the runtime executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from goc_deploy.errors import EngineDirError
from goc_deploy.samplers import MAX_LAGS, MAX_REACH, SamplerTable, sampler_misfit
from goc_deploy.schedule import MAX_HISTORY, Schedule
from goc_deploy.spec import ModelSpec

MAX_LAUNCH_UNITS = 88  # predictions of one launch: what the parameters of the plugin's kernel hold
SEGMENTS = ("full", "none")


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a unit's engine.

    Attributes:
        unit: index of the unit.
        store: slot that keeps the feature, or None where nobody reads it.
    """

    unit: int
    store: int | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Run all units of a step, one after the other, as one engine.

    Attributes:
        stores: per unit the slot that keeps its feature, or None where the engine does not give it.
    """

    stores: tuple[int | None, ...]

    @property
    def signature(self) -> str:
        """Whose features the engine gives, whatever slots keep them: ``-*2 w*6`` are those of all units but the first two."""
        marks = ("-" if store is None else "w" for store in self.stores)
        return " ".join(f"{mark}*{len(list(run))}" for mark, run in groupby(marks))


@dataclass(frozen=True, slots=True)
class Prediction:
    """One unit's ``g = c0 * (slot0 + c1 * slot1 + ...)``.

    The first coefficient multiplies the gate, which is small, so that a feature costs a pass less; what is stored is the
    sum in brackets, and the compiler accounts for the factor when it is read.

    Attributes:
        slots: history slots read; the one that weighs most comes first, so the other coefficients are within -1..1.
        coefficients: one per slot.
        store: slot that keeps the sum, or None. It may be one of ``slots``: the entry that dies.
    """

    slots: tuple[int, ...]
    coefficients: tuple[float, ...]
    store: int | None


@dataclass(frozen=True, slots=True)
class Predict:
    """Predict neighbouring units ``unit, unit + 1, ...`` in one launch: x += sum of gate * prediction.

    Attributes:
        unit: index of the first unit.
        predictions: one per unit.
        ahead: 0 adds to x of the step in which the launch runs. Where a later step computes nothing, its predictions do
            not depend on x: they are made as soon as their history is there, ``ahead`` steps early, with the gates of
            that step, and are added up in accumulator number ``ahead`` (eager accumulation), which unit 0 starts.
    """

    unit: int
    predictions: tuple[Prediction, ...]
    ahead: int = 0

    @property
    def signature(self) -> str:
        """What the launch looks like whatever it is bound to: ``2w*8`` is eight units of two entries that store."""
        shapes = (f"{len(p.slots)}{'w' if p.store is not None else ''}" for p in self.predictions)
        return " ".join(f"{shape}*{len(list(run))}" for shape, run in groupby(shapes))


@dataclass(frozen=True, slots=True)
class Collect:
    """A whole step that computes nothing: x += the accumulator that was filled ``ahead`` steps before."""

    ahead: int


Launch = Compute | Segment | Predict | Collect


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled schedule.

    Attributes:
        name: the plan's name in its engine directory.
        sampler: the sampler table, T rows.
        launches: [T] the launches of each step, in execution order.
        slots: number of feature-sized history buffers.
        schedule: what it was compiled from.
        segments: what runs as one engine where the backend builds engines (`goc_deploy.passes.with_stacks`): ``full``, a
            step that computes everything, or ``none``.
    """

    name: str
    sampler: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    slots: int
    schedule: Schedule
    segments: str = "none"

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.launches)

    @property
    def signatures(self) -> tuple[str, ...]:
        """Every distinct predict signature, sorted."""
        return tuple(
            sorted(
                {op.signature for step in self.launches for op in step if isinstance(op, Predict)}
            )
        )

    @property
    def segment_signatures(self) -> tuple[str, ...]:
        """Every distinct segment signature, sorted."""
        return tuple(
            sorted(
                {op.signature for step in self.launches for op in step if isinstance(op, Segment)}
            )
        )

    @property
    def accumulators(self) -> int:
        """Number of accumulators, which is also how many steps ahead the furthest prediction is made."""
        return max(
            (op.ahead for step in self.launches for op in step if isinstance(op, Predict)),
            default=0,
        )

    def step_kind(self, step: int) -> str:
        """``full`` computes every unit, ``collapsed`` none, ``mixed`` some."""
        ops = self.launches[step]
        computed = sum(isinstance(op, Compute) for op in ops)
        if computed == self.schedule.units or any(isinstance(op, Segment) for op in ops):
            return "full"
        return "mixed" if computed else "collapsed"

    @property
    def kind_counts(self) -> dict[str, int]:
        """How many steps are of each kind."""
        return dict(sorted(Counter(self.step_kind(k) for k in range(self.steps)).items()))

    @property
    def cache_features(self) -> int:
        """Feature-sized buffers that caching needs: history slots, accumulators, and zeros that these start from."""
        return self.slots + (self.accumulators + 1 if self.accumulators else 0)

    def cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Bytes of everything that caching keeps for ``batch`` rows (two per image with guidance)."""
        return self.cache_features * batch * spec.tokens * spec.hidden * item_bytes

    def naive_cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Bytes of the reference implementation's queue: two features per unit."""
        return 2 * spec.units * batch * spec.tokens * spec.hidden * item_bytes


def predictions(plan: Plan) -> Iterator[tuple[int, int, Prediction]]:
    """Yield (step, unit, prediction) in execution order."""
    for step, launches in enumerate(plan.launches):
        for op in launches:
            if isinstance(op, Predict):
                for offset, prediction in enumerate(op.predictions):
                    yield step, op.unit + offset, prediction


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Check that a plan is safe to execute for this model.

    Every unit acts once on every step, in order or through an accumulator that is filled before and collected once;
    slots are in range, and nothing is read before it is written.

    Raises:
        EngineDirError: naming the step and what is wrong.
    """
    if plan.sampler.steps != plan.steps or not plan.steps:
        raise EngineDirError(
            f"plan {plan.name}: {plan.steps} steps but a sampler table of {plan.sampler.steps}"
        )
    _check_table(plan, spec)
    every_unit = list(range(spec.units))
    written: set[int] = set()
    accumulated: dict[int, list[int]] = {}  # target step -> units
    for step, launches in enumerate(plan.launches):
        order: list[int] = []
        for op in launches:
            if isinstance(op, Collect):
                order += _collected(plan, step, op, accumulated, every_unit)
                continue
            first, entries = _entries(op)
            target = step + (op.ahead if isinstance(op, Predict) else 0)
            if not step <= target < plan.steps:
                raise EngineDirError(
                    f"plan {plan.name}: step {step} predicts for step {target}, which does not exist"
                )
            units = order if target == step else accumulated.setdefault(target, [])
            units += range(first, first + len(entries))
            _check_launch(plan, step, entries, written)
        if order != every_unit:
            raise EngineDirError(
                f"plan {plan.name}: step {step} does not run each of the {spec.units} units once, in order"
            )
    if accumulated:
        raise EngineDirError(
            f"plan {plan.name}: what was accumulated for step {min(accumulated)} is never added"
        )


def _entries(op: Compute | Segment | Predict) -> tuple[int, tuple[Prediction, ...]]:
    """The first unit of a launch, and what it reads and stores per unit."""
    if isinstance(op, Predict):
        return op.unit, op.predictions
    first, stores = (op.unit, (op.store,)) if isinstance(op, Compute) else (0, op.stores)
    return first, tuple(Prediction((), (), store) for store in stores)


def _check_table(plan: Plan, spec: ModelSpec) -> None:
    table = plan.sampler
    columns = (table.latent, table.model, table.noise, table.spread, table.estimate, table.history)
    if any(len(column) != table.steps for column in columns):
        raise EngineDirError(f"plan {plan.name}: the columns of its sampler table differ in length")
    if table.reach > MAX_REACH or any(len(row) != table.reach for row in table.history):
        raise EngineDirError(
            f"plan {plan.name}: its sampler must reach back the same 0 to {MAX_REACH} steps at every step"
        )
    if any(sum(map(bool, row)) > MAX_LAGS for row in table.history):
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


def _collected(
    plan: Plan, step: int, op: Collect, accumulated: dict[int, list[int]], every_unit: list[int]
) -> list[int]:
    """The units of a step that come from an accumulator: all of them, all from the step ``ahead`` before."""
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
            f"plan {plan.name}: step {step} adds an accumulator that does not hold each of the {len(every_unit)} units once"
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
                f"plan {plan.name}: step {step} has {len(entry.coefficients)} coefficients for {len(entry.slots)} slots"
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
                f"plan {plan.name}: step {step} overwrites slot {store} while the same launch uses it"
            )
    written.update(stores)
