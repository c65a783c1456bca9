"""The plan: a schedule compiled for a model, a sampler and a step count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from goc_deploy.blocks import TokenStream
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
        stores: for each feature of the unit, the slot that keeps it, or None if no launch reads it.
    """

    unit: int
    stores: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Run all units of a step, one after the other, as one engine.

    Attributes:
        stores: for each feature of each unit, unit by unit, the slot that keeps it, or None if the
            engine does not output it.
    """

    stores: tuple[int | None, ...]

    @property
    def signature(self) -> str:
        """Which features the engine outputs; it does not depend on the slots.

        ``-*2 w*6`` outputs all features but the first two.
        """
        marks = ("-" if store is None else "w" for store in self.stores)
        return " ".join(f"{mark}*{len(list(run))}" for mark, run in groupby(marks))


@dataclass(frozen=True, slots=True)
class Prediction:
    """One feature's ``g = c0 * (slot0 + c1 * slot1 + ...)``.

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
    """Predict features in one launch: stream += sum of gate * prediction.

    Attributes:
        feature: index of the first feature; the others follow it.
        predictions: one per feature.
        ahead: 0 adds to x of the step in which the launch runs. The predictions of a collapsed step
            do not depend on x. They can be made ``ahead`` steps early, with the gates of the
            collapsed step, and are then summed up in accumulator number ``ahead``. The launch of
            feature 0 starts the accumulator.
        stream: the stream of the features.
    """

    feature: int
    predictions: tuple[Prediction, ...]
    ahead: int = 0
    stream: TokenStream = "image"

    @property
    def signature(self) -> str:
        """What each prediction reads and stores; it does not depend on the slots.

        ``2w*8`` is eight predictions that each read two entries and are stored.
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
    """What a computed feature adds to its prediction in a later step.

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
        feature: index of the feature.
        slot: slot that keeps the feature.
        taps: 1 to ``MAX_TAPS``; those that start an accumulator come last.
        stream: the stream of the feature, to whose accumulators it is added.
    """

    feature: int
    slot: int
    taps: tuple[Tap, ...]
    stream: TokenStream = "image"

    @property
    def signature(self) -> str:
        """How many accumulators it adds to and how many it starts: ``a*2 s*1``."""
        return accumulate_signature([tap.starts for tap in self.taps])


@dataclass(frozen=True, slots=True)
class AddSum:
    """Predict adjacent features of a step: stream += the accumulator that holds their taps.

    Attributes:
        accumulator: index of the accumulator, which is free afterwards.
        feature: index of the first feature.
        features: number of features.
        stream: the stream of the features.
    """

    accumulator: int
    feature: int
    features: int
    stream: TokenStream = "image"


Launch = Compute | Segment | Predict | Collect | Residual | Accumulate | AddSum


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled schedule.

    Attributes:
        name: the plan's name in its engine directory.
        sampler: the sampler table, T rows.
        launches: [T] the launches of each step, in execution order.
        slots: number of history buffers for features of the image.
        schedule: the schedule that it was compiled from.
        segments: what a device runs as one engine: ``full``, all units of a full step, or
            ``none``.
        form: ``host``, the form of `goc_deploy.compiler.forms.compile_for_host` that engine
            directories store, ``device``, or ``sums``, which keeps no feature per unit.
        form_reason: why a loaded plan has its form, for reports.
        text_slots: number of history buffers for features of the text.
        reference_slots: number of history buffers for features of the references.
    """

    name: str
    sampler: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    slots: int
    schedule: Schedule
    segments: Segments = "none"
    form: PlanForm = "host"
    form_reason: str = field(default="", compare=False)
    text_slots: int = 0
    reference_slots: int = 0

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
        """Number of accumulators of the image."""
        ops = [op for step in self.launches for op in step]
        ahead = [op.ahead for op in ops if isinstance(op, Predict)]
        return max([self.accumulators_of("image"), *ahead])

    def slots_of(self, stream: TokenStream) -> int:
        """Number of history buffers for features of a stream."""
        slots = {"image": self.slots, "text": self.text_slots, "reference": self.reference_slots}
        return slots[stream]

    def accumulators_of(self, stream: TokenStream) -> int:
        """Number of accumulators of a stream that features are added to."""
        ops = [op for step in self.launches for op in step if isinstance(op, Accumulate)]
        used = [tap.accumulator for op in ops if op.stream == stream for tap in op.taps]
        return max(used, default=-1) + 1

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
        """Number of buffers of the size of the tokens of the image.

        These are the slots, the accumulators, the zeros from which they start if predictions are
        made ahead, and the tokens before all units if residuals are kept.
        """
        return self.slots + self.accumulators + self.predicts_ahead + self.keeps_residuals

    def features_of(self, stream: TokenStream) -> int:
        """Number of buffers of the size of the tokens of a stream other than the image."""
        return self.slots_of(stream) + self.accumulators_of(stream)

    def cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Size of the cache for ``batch`` rows (two per image with guidance)."""
        others = (self.features_of(s) * spec.tokens_of(s) for s in spec.streams if s != "image")
        tokens = self.cache_features * spec.tokens + sum(others)
        return tokens * batch * spec.hidden * item_bytes

    def naive_cache_bytes(self, spec: ModelSpec, batch: int, item_bytes: int) -> int:
        """Size of the reference implementation's queue: two entries of every feature."""
        tokens = sum(spec.tokens_of(place.feature.stream) for place in spec.features)
        return 2 * tokens * batch * spec.hidden * item_bytes
