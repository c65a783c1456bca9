"""A laboratory whose calibrator and trials a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from goc_deploy.policies.calibration import Calibrator, Trials


@dataclass(frozen=True, slots=True)
class StandInLaboratory:
    """Implements `goc_deploy.policies.calibration.Laboratory`."""

    calibrator: Callable[[int], Calibrator]
    trials: Callable[[], Trials]
