"""Calibration: what policies that learn from data may use, and the images they learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from goc_deploy.errors import ScheduleError, UsageError
from goc_deploy.guidance import CFG_SCALE
from goc_deploy.options import CALIBRATION_SEED, Progress
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule, check_amplification
from goc_deploy.schedule.operations import full_step_flops
from goc_deploy.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np

    from goc_deploy.policies.fit import FitOptions
    from goc_deploy.policies.head import HeadOptions
    from goc_deploy.samplers.head import HeadFeatures

MAX_GAP = 3  # steps that SmoothCache looks back, its calibration_lookahead
DEFAULT_IMAGES = 16
DEFAULT_FLOPS = (
    10**12
)  # for the images without cache; policies that measure schedules take a few times that
MAX_IMAGES = 100_000
FULL_PRECISION = "full precision"  # in records: what candidates are compared with

Reading = Literal["exists", "at_eta"]  # of GOC's eq. 7, see `goc_deploy.policies.god.is_inverse`


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which images to calibrate on.

    Attributes:
        images: how many images K.
        seed: of labels and noise; image i gets noise from (seed, i) alone.
        cfg_scale: classifier-free guidance scale; use the one to generate with.
        cfg_channels: guidance acts on the first channels only.
    """

    images: int = DEFAULT_IMAGES
    seed: int = CALIBRATION_SEED
    cfg_scale: float = CFG_SCALE
    cfg_channels: int = 3


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration saw without cache.

    Attributes:
        means: (T, U, tokens, D) float32 features averaged over images, conditional and
            unconditional rows alike: A_k. The features of a unit follow each other along the
            tokens, and zeros follow those of a unit with fewer tokens.
        changes: (T, U, MAX_GAP) ``|F_k - F_(k-j)|_1 / |F_k|_1`` averaged over images, for j = 1 ..
            MAX_GAP; infinite where there is no step k - j. Source: SmoothCache, eq. 4.
    """

    means: np.ndarray
    changes: np.ndarray


class Calibrator(Protocol):
    """What a policy may learn about an engine, a sampler and a step count."""

    def statistics(self) -> Statistics:
        """Features without cache."""
        ...

    def error(self, schedule: Schedule) -> float:
        """Relative L2 error of the final latents to those that are aimed at, over all images.

        They are those without cache, of this engine directory or of one in full precision.
        """
        ...

    def fit(self, schedule: Schedule, options: FitOptions) -> Schedule:
        """The schedule with fitted coefficients in place of plain reuse, and their provenance."""
        ...

    def describe(self) -> dict[str, Any]:
        """Images, seed, guidance, sampler and checkpoint, as plain data for the schedule file."""
        ...


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a run that was not warmed up.

    Attributes:
        latents: final latents (N, C, H, W) float32.
        total_ms: of the run.
        step_ms: median over the steps of each kind: ``full``, ``mixed``, ``collapsed``.
    """

    latents: np.ndarray
    total_ms: float
    step_ms: dict[str, float]


class Trials(Protocol):
    """Runs schedules of any step count as plans would run.

    Attributes:
        sampler: sampler SPEC.
        options: the calibration images.
        progress: called with (what, done, total).
    """

    sampler: str
    options: CalibrationOptions
    progress: Progress

    def table(self, steps: int) -> SamplerTable:
        """The sampler's table for a step count.

        Raises:
            UsageError: the sampler does not go with the model, or not with this number of steps.
        """
        ...

    def aim(self, schedule: Schedule, images: CalibrationOptions) -> np.ndarray:
        """Draw the images that others are compared with, in full precision if that is known.

        Args:
            schedule: a schedule without cache.
            images: the images.

        Returns:
            Final latents (N, C, H, W) float32.
        """
        ...

    def run(self, schedule: Schedule, images: CalibrationOptions) -> Trial:
        """Draw images with a schedule.

        Raises:
            ScheduleError: it is illegal or unstable.
            VerificationError: the results are not finite.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Images, seed, guidance, sampler and checkpoint, as plain data for the schedule file."""
        ...


class HeadTrials(Protocol):
    """Measures what schedules of any step count reach with heads that are fitted for them."""

    def error(self, schedule: Schedule, features: HeadFeatures) -> float:
        """Fit a head of these features, and measure it on images that the fit does not see.

        Returns:
            The mean relative L2 error of the final latents to those that the head aims at; infinite
            if the schedule diverges.

        Raises:
            UsageError: the sampler cannot have a head, or not with this number of steps.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Images, seed, guidance, sampler and checkpoint, as plain data for the schedule file."""
        ...


@dataclass(frozen=True, slots=True)
class Observation:
    """A run of a unit in a computed step; the arrays are views that the next run overwrites.

    Attributes:
        unit: name of the unit.
        step: index of the step.
        inputs: the inputs of its graph.
        outputs: the outputs of its graph that a plan uses.
        more: the outputs that were asked for.
    """

    unit: str
    step: int
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    more: Mapping[str, np.ndarray]


# Unit -> name of a further output of its graph -> shape; it is float32.
MoreOutputs = Mapping[str, Mapping[str, tuple[int, ...]]]


class Laboratory(Protocol):
    """How policies that learn reach an engine directory, which is loaded at its first use."""

    def calibrator(self, steps: int) -> Calibrator:
        """Measures features and errors for a step count."""
        ...

    def trials(self) -> Trials:
        """Runs whole schedules."""
        ...

    def head_trials(self, options: HeadOptions, images: int) -> AbstractContextManager[HeadTrials]:
        """Fits heads of schedules on some images.

        Raises:
            ConflictError, ResourceError: its files are in use or cannot be written.
        """
        ...


class ObservingLaboratory(Laboratory, Protocol):
    """A laboratory that can also run units with further outputs."""

    def observe(
        self,
        schedule: Schedule,
        table: SamplerTable,
        more: MoreOutputs,
        see: Callable[[Observation], None],
    ) -> None:
        """Run a schedule on the calibration images, and show every run of a unit.

        Args:
            schedule: the schedule.
            table: the sampler of its steps.
            more: the further outputs.
            see: called after every run of a unit that has further outputs.
        """
        ...


def default_images(spec: ModelSpec, steps: int) -> int:
    """Default number of calibration images: 16, or what ``DEFAULT_FLOPS`` pay for, at least one."""
    return max(1, min(DEFAULT_IMAGES, DEFAULT_FLOPS // (steps * full_step_flops(spec, 2))))


def check_options(options: CalibrationOptions) -> None:
    """Check ranges.

    Raises:
        UsageError: naming the option.
    """
    if not 1 <= options.images <= MAX_IMAGES:
        raise UsageError(f"`calibrate` must be within 1..{MAX_IMAGES} images, got {options.images}")
    if not 0 <= options.seed < 2**64:
        raise UsageError(f"seed must be within 0..2**64-1, got {options.seed}")
    if not 0 <= options.cfg_scale <= 1e3:
        raise UsageError(f"cfg_scale must be a number within 0..1000, got {options.cfg_scale}")


def measured_error(calibrator: Calibrator, schedule: Schedule) -> float:
    """`Calibrator.error`; infinite if the compiler would refuse the schedule."""
    try:
        check_amplification(schedule)
    except ScheduleError:
        return math.inf
    return calibrator.error(schedule)
