"""What a policy may use while it makes a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from goc_deploy.errors import CalibrationNeededError, EnvironmentUnsupportedError
from goc_deploy.policies.calibration import Laboratory
from goc_deploy.policies.head import HeadOptions
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

Correct = Callable[[Schedule, str], Schedule]
ReadRouter = Callable[[str], tuple[tuple[float, ...], ...]]


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know.

    Attributes:
        spec: the model.
        steps: sampling steps asked for.
        correct: a schedule and a correction such as ``lagrange:2`` to the corrected schedule, which
            is legal to run. For policies that try several.
        options: options of the SPEC as text; a flag has an empty value. Policies with an options
            dataclass have theirs there.
        correction: the correction of the SPEC as written, such as ``gc:1.2``, or None.
        correction_calibrates: whether that correction learns from images.
        head: the head that will be fitted for the schedule, or None.
        laboratory: how policies that learn reach an engine, or None if there is none.
        read_router: path of a Learning-to-Cache router file to its probabilities per step and unit.
            None if this process reads no checkpoints.
    """

    spec: ModelSpec
    steps: int
    correct: Correct
    options: Mapping[str, str] = field(default_factory=dict)
    correction: str | None = None
    correction_calibrates: bool = False
    head: HeadOptions | None = None
    laboratory: Laboratory | None = None
    read_router: ReadRouter | None = None

    def required_laboratory(self) -> Laboratory:
        """Return the laboratory of a policy that cannot do without one.

        Raises:
            CalibrationNeededError: there is none.
        """
        if self.laboratory is None:
            raise CalibrationNeededError(
                "this policy calibrates, which needs an engine directory; use goc-export or "
                "goc-plan"
            )
        return self.laboratory

    def router(self, path: str) -> tuple[tuple[float, ...], ...]:
        """Probabilities per step and unit of a Learning-to-Cache router file.

        Raises:
            EnvironmentUnsupportedError: this process reads no checkpoints.
            ModelError, SafetyError: the file is not a router, or asks to run code.
        """
        if self.read_router is None:
            raise EnvironmentUnsupportedError(
                "'l2c:' reads a router file, which needs goc-export or goc-plan"
            )
        return self.read_router(path)
