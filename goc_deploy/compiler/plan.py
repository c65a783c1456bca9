"""The plan: a schedule compiled for a model, a sampler and a step count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from goc_deploy.compiler.cache_ops import accumulate_signature, predict_signature
from goc_deploy.options import Segments
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

MAX_LAUNCH_UNITS = 88  # limit of predictions in the parameters of the plugin's kernel
MAX_TAPS = 4  # of a launch; more make more kinds of graphs, and save little
PlanForm = Literal["host", "device", "sums"]
StepKind = Literal["full", "mixed", "collapsed"]


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a unit's engine.

    Attributes:
        unit: index of the unit.
        store: slot that keeps the feature, or None if no launch reads it.
    """

    unit: int
    store: int | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Run all units of a step, one after the other, as one engine.

    Attributes:
        stores: per unit the slot that keeps its feature, or None if the engine does not output it.
    """

    stores: tuple[int | None, ...]

    @property
    def signature(self) -> str:
        """Which units' features the engine outputs; it does not depend on the slots.

        ``-*2 w*6`` outputs the features of all units but the first two.
        """
        marks = ("-" if store is None else "w" for store in self.stores)
        return " ".join(f"{mark}*{len(list(run))}" for mark, run in groupby(marks))


@dataclass(frozen=True, slots=True)
class Prediction:
    """One unit's ``g = c0 * (slot0 + c1 * slot1 + ...)``.

    The first coefficient is multiplied into the gate, which is small. That saves a pass over the
    feature. The sum in brackets is stored, and the compiler accounts for the factor when the sum
    is read.

    Attributes:
        slots: history slots that are read, the one with the largest coefficient first, so that the
            other coefficients are within -1..1.
        coefficients: one per slot.
        store: slot that keeps the sum, or None. It may be one of ``slots`` if its entry is not
            read again.
    """

    slots: tuple[int, ...]
    coefficients: tuple[float, ...]
    store: int | None


@dataclass(frozen=True, slots=True)
class Predict:
    """Predict units ``unit, unit + 1, ...`` in one launch: x += sum of gate * prediction.

    Attributes:
        unit: index of the first unit.
        predictions: one per unit.
        ahead: 0 adds to x of the step in which the launch runs. The predictions of a collapsed step
            do not depend on x. They can be made ``ahead`` steps early, with the gates of the
            collapsed step, and are then summed up in accumulator number ``ahead``. The launch of
            unit 0 starts the accumulator.
    """

    unit: int
    predictions: tuple[Prediction, ...]
    ahead: int = 0

    @property
    def signature(self) -> str:
        """What each unit reads and stores; it does not depend on the slots.

        ``2w*8`` is eight units that each read two entries and store their prediction.
        """
        return predict_signature((len(p.slots), p.store is not None) for p in self.predictions)


@dataclass(frozen=True, slots=True)
class Collect:
    """A whole collapsed step: x += the accumulator that was filled ``ahead`` steps before."""

    ahead: int


@dataclass(frozen=True, slots=True)
class Residual:
    """Keep the residual of a full step: the tokens after all units minus those before the first.

    Plans whose schedule has the level ``residual`` predict it in place of the features of units.
    There, ``Predict(0, ...)`` of one prediction stands for all units, and its gate is one.

    Attributes:
        store: slot that keeps the residual.
    """

    store: int


@dataclass(frozen=True, slots=True)
class Tap:
    """What a computed feature adds to the prediction of its unit in a later step.

    Attributes:
        accumulator: the accumulator that takes it.
        ahead: number of steps to the step that adds the accumulator; the gate is of that step.
        coefficient: the weight of the feature.
        starts: whether the accumulator begins with this tap; otherwise the tap is added to it.
    """

    accumulator: int
    ahead: int
    coefficient: float
    starts: bool


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Add a feature that was just computed to accumulators: ``a += gate * coefficient * g``.

    Attributes:
        unit: index of the unit that computed the feature.
        slot: slot that keeps the feature.
        taps: 1 to ``MAX_TAPS``; those that start an accumulator come last.
    """

    unit: int
    slot: int
    taps: tuple[Tap, ...]

    @property
    def signature(self) -> str:
        """How many accumulators it adds to and how many it starts: ``a*2 s*1``."""
        return accumulate_signature([tap.starts for tap in self.taps])


@dataclass(frozen=True, slots=True)
class AddSum:
    """Predict adjacent units of a step: x += the accumulator that holds their taps.

    Attributes:
        accumulator: index of the accumulator, which is free afterwards.
        unit: index of the first unit.
        units: number of units.
    """

    accumulator: int
    unit: int
    units: int


Launch = Compute | Segment | Predict | Collect | Residual | Accumulate | AddSum


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled schedule.

    Attributes:
        name: the plan's name in its engine directory.
        sampler: the sampler table, T rows.
        launches: [T] the launches of each step, in execution order.
        slots: number of feature-sized history buffers.
        schedule: the schedule that it was compiled from.
        segments: what a device runs as one engine: ``full``, all units of a full step, or
            ``none``.
        form: ``host``, the form of `goc_deploy.compiler.passes.compile_for_host` that engine
            directories store, ``device``, or ``sums``, which keeps no feature per unit.
        form_reason: why a loaded plan has its form, for reports.
    """

    name: str
    sampler: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    slots: int
    schedule: Schedule
    segments: Segments = "none"
    form: PlanForm = "host"
    form_reason: str = field(default="", compare=False)

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.launches)

    @property
    def signatures(self) -> tuple[str, ...]:
        """Every distinct signature of a launch that predicts or accumulates, sorted."""
        ops = [op for step in self.launches for op in step if isinstance(op, Predict | Accumulate)]
        return tuple(sorted({op.signature for op in ops}))

    @property
    def segment_signatures(self) -> tuple[str, ...]:
        """Every distinct segment signature, sorted."""
        return tuple(
            sorted(
                {op.signature for step in self.launches for op in step if isinstance(op, Segment)}
            )
        )

    @property
    def keeps_residuals(self) -> bool:
        """Whether a step keeps its residual, for which the tokens before all units are kept too."""
        return any(isinstance(op, Residual) for step in self.launches for op in step)

    @property
    def predicts_ahead(self) -> bool:
        """Whether predictions are made ahead, into accumulators that start from zeros."""
        return any(isinstance(op, Predict) and op.ahead for step in self.launches for op in step)

    @property
    def accumulators(self) -> int:
        """Number of accumulators."""
        ops = [op for step in self.launches for op in step]
        taps = [tap for op in ops if isinstance(op, Accumulate) for tap in op.taps]
        last = max((tap.accumulator for tap in taps), default=-1)
        return max([last + 1, *(op.ahead for op in ops if isinstance(op, Predict))])

    def targets(self, step: int) -> tuple[int, ...]:
        """The later steps for which a step predicts, sorted."""
        ops = self.launches[step]
        ahead = {op.ahead for op in ops if isinstance(op, Predict) and op.ahead}
        ahead |= {tap.ahead for op in ops if isinstance(op, Accumulate) for tap in op.taps}
        return tuple(step + steps for steps in sorted(ahead))

    def step_kind(self, step: int) -> StepKind:
        """``full`` if the step computes every unit, ``collapsed`` if none, otherwise ``mixed``."""
        ops = self.launches[step]
        computed = sum(isinstance(op, Compute) for op in ops)
        if computed == self.schedule.units or any(isinstance(op, Segment) for op in ops):
            return "full"
        return "mixed" if computed else "collapsed"

    @property
    def kind_counts(self) -> dict[StepKind, int]:
        """Count the steps of each kind."""
        return dict(sorted(Counter(self.step_kind(k) for k in range(self.steps)).items()))

    @property
    def cache_features(self) -> int:
        """Number of feature-sized buffers.

        These are the slots, the accumulators, the zeros from which they start if predictions are
        made ahead, and the tokens before all units if residuals are kept.
        """
        return self.slots + self.accumulators + self.predicts_ahead + self.keeps_residuals

    def cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Size of the cache for ``batch`` rows (two per image with guidance)."""
        return self.cache_features * batch * spec.tokens * spec.hidden * item_bytes

    def naive_cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Size of the reference implementation's queue: two features per unit."""
        return 2 * spec.units * batch * spec.tokens * spec.hidden * item_bytes
