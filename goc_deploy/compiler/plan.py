"""The plan: a schedule compiled for one model, sampler and step count. What the runtime executes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from goc_deploy.compiler.cache_ops import predict_signature
from goc_deploy.options import Segments
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

MAX_LAUNCH_UNITS = 88  # predictions of one launch: what the parameters of the plugin's kernel hold
PlanForm = Literal["host", "device"]
StepKind = Literal["full", "mixed", "collapsed"]


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
        return predict_signature((len(p.slots), p.store is not None) for p in self.predictions)


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
        segments: what a device shall run as one engine: ``full``, a step that computes everything, or
            ``none``.
        form: ``host`` as `goc_deploy.compiler.passes.compile_for_host` makes it, which engine
            directories hold, or ``device``.
    """

    name: str
    sampler: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    slots: int
    schedule: Schedule
    segments: Segments = "none"
    form: PlanForm = "host"

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

    def step_kind(self, step: int) -> StepKind:
        """``full`` computes every unit, ``collapsed`` none, ``mixed`` some."""
        ops = self.launches[step]
        computed = sum(isinstance(op, Compute) for op in ops)
        if computed == self.schedule.units or any(isinstance(op, Segment) for op in ops):
            return "full"
        return "mixed" if computed else "collapsed"

    @property
    def kind_counts(self) -> dict[StepKind, int]:
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
