"""What a policy may ask while it makes a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from goc_deploy.errors import CalibrationNeededError
from goc_deploy.policies.calibration import Laboratory
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know.

    Attributes:
        spec: the model.
        steps: sampling steps asked for.
        options: options of the SPEC; a flag has an empty value.
        correction: the correction of the SPEC as written, such as ``gc:1.2``, or None.
        laboratory: how policies that learn reach an engine, or None where there is none.
    """

    spec: ModelSpec
    steps: int
    options: Mapping[str, str]
    correction: str | None = None
    laboratory: Laboratory | None = None

    def engine(self) -> Laboratory:
        """How to reach the engine.

        Raises:
            CalibrationNeededError: there is none.
        """
        if self.laboratory is None:
            raise CalibrationNeededError(
                "this policy calibrates, which needs an engine directory; use goc-export or goc-plan"
            )
        return self.laboratory
