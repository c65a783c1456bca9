"""The check of launches of the form ``sums``."""

from __future__ import annotations

from dataclasses import dataclass, field

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler.plan import MAX_TAPS, Accumulate, AddSum, Compute, Launch, Plan, Tap
from goc_deploy.compiler.values import features_of_units
from goc_deploy.errors import EngineDirError
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Held:
    """What an accumulator holds: predictions of these features for a step."""

    step: int
    features: set[int] = field(default_factory=set)


class SumsCheck:
    """Follows the accumulators of a plan, launch by launch, and refuses what it must not run.

    Args:
        plan: the plan.
        spec: the model.
    """

    def __init__(self, plan: Plan, spec: ModelSpec) -> None:
        self._plan, self._units = plan, features_of_units(spec)
        self._held: dict[tuple[TokenStream, int], _Held] = {}
        # stream and slot -> step and index of the feature in it
        self._features: dict[tuple[TokenStream, int], tuple[int, int]] = {}

    def check_form(self, step: int, op: Launch) -> None:
        """Check that a launch belongs to the form of the plan.

        Raises:
            EngineDirError: it does not.
        """
        of_sums = isinstance(op, Accumulate | AddSum)
        if not isinstance(op, Compute) and of_sums != (self._plan.form == "sums"):
            raise EngineDirError(
                f"plan {self._plan.name}: step {step} launches {type(op).__name__}, which a plan "
                f"of the form {self._plan.form} does not have"
            )

    def computed(self, step: int, op: Compute) -> None:
        """Note which features slots keep."""
        for (feature, stream), store in zip(self._units[op.unit], op.stores, strict=True):
            if store is not None:
                self._features[stream, store] = (step, feature)

    def accumulate(self, step: int, op: Accumulate) -> None:
        """Check a launch that adds a feature to accumulators.

        Raises:
            EngineDirError: the slot keeps another feature, or a tap goes to an accumulator of
                another step, or to one that it must not start or cannot add to.
        """
        where = f"plan {self._plan.name}: step {step}, feature {op.feature}"
        if self._features.get((op.stream, op.slot)) != (step, op.feature):
            raise EngineDirError(f"{where} accumulates slot {op.slot}, which has another feature")
        starts = [tap.starts for tap in op.taps]
        if not 1 <= len(starts) <= MAX_TAPS or starts != sorted(starts):
            raise EngineDirError(
                f"{where} has {len(starts)} taps; a launch has 1 to {MAX_TAPS}, those that start "
                "an accumulator last"
            )
        for tap in op.taps:
            self._tap(where, step, op, tap)

    def _tap(self, where: str, step: int, op: Accumulate, tap: Tap) -> None:
        target = step + tap.ahead
        if not step < target < self._plan.steps:
            raise EngineDirError(f"{where} predicts for step {target}, which does not exist")
        place = op.stream, tap.accumulator
        held = self._held.get(place)
        if tap.starts and held is not None:
            raise EngineDirError(
                f"{where} starts accumulator {tap.accumulator} over, which step {held.step} adds"
            )
        if tap.starts:
            held = self._held[place] = _Held(target)
        if held is None:
            raise EngineDirError(f"{where} adds to accumulator {tap.accumulator}, which is empty")
        if held.step != target:
            raise EngineDirError(
                f"{where} uses the gate of step {target} in accumulator {tap.accumulator}, which "
                f"step {held.step} adds"
            )
        held.features.add(op.feature)

    def added(self, step: int, op: AddSum) -> range:
        """Check a launch that adds an accumulator to x, and free the accumulator.

        Returns:
            The features that it predicts.

        Raises:
            EngineDirError: the accumulator holds other features, or those of another step.
        """
        features = range(op.feature, op.feature + op.features)
        held = self._held.pop((op.stream, op.accumulator), None)
        if held is None or held.step != step or held.features != set(features):
            raise EngineDirError(
                f"plan {self._plan.name}: step {step} adds accumulator {op.accumulator}, which "
                f"does not hold features {features.start} to {features.stop - 1} of this step"
            )
        return features

    @property
    def targets(self) -> set[int]:
        """The later steps that accumulators hold predictions for."""
        return {held.step for held in self._held.values()}

    def check_empty(self) -> None:
        """Check that every accumulator was added.

        Raises:
            EngineDirError: one was not.
        """
        for (_, accumulator), held in self._held.items():
            raise EngineDirError(
                f"plan {self._plan.name}: accumulator {accumulator} for step {held.step} is never "
                "added"
            )
