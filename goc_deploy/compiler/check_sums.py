"""The check of launches of the form ``sums``."""

from __future__ import annotations

from dataclasses import dataclass, field

from goc_deploy.compiler.plan import MAX_TAPS, Accumulate, AddSum, Compute, Launch, Plan, Tap
from goc_deploy.errors import EngineDirError


@dataclass(frozen=True, slots=True)
class _Held:
    """What an accumulator holds: predictions of these units for a step."""

    step: int
    units: set[int] = field(default_factory=set)


class SumsCheck:
    """Follows the accumulators of a plan, launch by launch, and refuses what it must not run.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._held: dict[int, _Held] = {}
        self._features: dict[int, tuple[int, int]] = {}  # slot -> step and unit of its feature

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
        """Note which feature a slot keeps."""
        if op.store is not None:
            self._features[op.store] = (step, op.unit)

    def accumulate(self, step: int, op: Accumulate) -> None:
        """Check a launch that adds a feature to accumulators.

        Raises:
            EngineDirError: the slot keeps another feature, or a tap goes to an accumulator of
                another step, or to one that it must not start or cannot add to.
        """
        where = f"plan {self._plan.name}: step {step}, unit {op.unit}"
        if self._features.get(op.slot) != (step, op.unit):
            raise EngineDirError(f"{where} accumulates slot {op.slot}, which has another feature")
        starts = [tap.starts for tap in op.taps]
        if not 1 <= len(starts) <= MAX_TAPS or starts != sorted(starts):
            raise EngineDirError(
                f"{where} has {len(starts)} taps; a launch has 1 to {MAX_TAPS}, those that start "
                "an accumulator last"
            )
        for tap in op.taps:
            self._tap(where, step, op.unit, tap)

    def _tap(self, where: str, step: int, unit: int, tap: Tap) -> None:
        target = step + tap.ahead
        if not step < target < self._plan.steps:
            raise EngineDirError(f"{where} predicts for step {target}, which does not exist")
        held = self._held.get(tap.accumulator)
        if tap.starts and held is not None:
            raise EngineDirError(
                f"{where} starts accumulator {tap.accumulator} over, which step {held.step} adds"
            )
        if tap.starts:
            held = self._held[tap.accumulator] = _Held(target)
        if held is None:
            raise EngineDirError(f"{where} adds to accumulator {tap.accumulator}, which is empty")
        if held.step != target:
            raise EngineDirError(
                f"{where} uses the gate of step {target} in accumulator {tap.accumulator}, which "
                f"step {held.step} adds"
            )
        held.units.add(unit)

    def added(self, step: int, op: AddSum) -> range:
        """Check a launch that adds an accumulator to x, and free the accumulator.

        Returns:
            The units that it predicts.

        Raises:
            EngineDirError: the accumulator holds other units, or those of another step.
        """
        units = range(op.unit, op.unit + op.units)
        held = self._held.pop(op.accumulator, None)
        if held is None or held.step != step or held.units != set(units):
            raise EngineDirError(
                f"plan {self._plan.name}: step {step} adds accumulator {op.accumulator}, which "
                f"does not hold units {units.start} to {units.stop - 1} of this step"
            )
        return units

    def check_empty(self) -> None:
        """Check that every accumulator was added.

        Raises:
            EngineDirError: one was not.
        """
        for accumulator, held in sorted(self._held.items()):
            raise EngineDirError(
                f"plan {self._plan.name}: accumulator {accumulator} for step {held.step} is never "
                "added"
            )
