"""The part ``+head`` of a SPEC: a fitted linear correction of the latents after every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from goc_deploy.errors import UsageError
from goc_deploy.policies.calibration import DEFAULT_FLOPS, MAX_IMAGES
from goc_deploy.policies.options import argument, option
from goc_deploy.samplers.head import HeadFeatures, HeadForm
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.schedule.operations import full_step_flops
from goc_deploy.spec import ModelSpec

HEAD_HELP = "Correct the latents after every step by a linear function of what the step knows."
DEFAULT_HEAD_IMAGES = 512
FEWEST_DEFAULT_IMAGES = 16  # `patch` gains with as few
HEAD_FLOPS = 64 * DEFAULT_FLOPS
HELD_OUT_EVERY = 8
LATER_OUTPUTS, LATER_TOKENS = 3, 2  # computed steps that are read besides the current step

Target = Literal["uncached", "converged"]


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """Options of a head.

    Attributes:
        features: what it reads, see `goc_deploy.samplers.head.HeadForm`.
        target: which latents the fit aims at.
        images: number of calibration images, an eighth of which is held out; None is undecided.
        skip_predicted: whether collapsed steps are left out.
        scaled: whether the features are read a second time, multiplied by the guidance scale.
        scales: smallest and largest guidance scale of the calibration images; None is the one
            scale of the calibration.
    """

    features: HeadFeatures = argument(
        "Read single values, or patches; hidden adds the tokens before the final layer to the "
        "patches, and squares adds the squares of these tokens too.",
        default="hidden",
    )
    target: Target = option(
        "Aim at the latents without cache at the same steps, or at those of the converged "
        "solution (250 steps).",
        default="uncached",
    )
    images: int | None = option(
        "Calibration images of the head; an eighth of them only judges. Without it, the number of "
        f"calibration images that is asked for, or {DEFAULT_HEAD_IMAGES}, fewer for large models.",
        default=None,
        low=HELD_OUT_EVERY,
        high=MAX_IMAGES,
    )
    skip_predicted: bool = option(
        "Leave out the collapsed steps; the head leads to the next computed step.",
        default=False,
    )
    scaled: bool = option(
        "Read everything twice, once multiplied by the guidance scale; needs scales.",
        default=False,
    )
    scales: tuple[float, float] | None = option(
        "Range of guidance scales to fit for. Without it, the scale of the calibration images.",
        default=None,
        form="LO..HI",
        low=0,
        high=100,
    )

    @property
    def form(self) -> HeadForm:
        """The form of the head."""
        return self.form_of(self.features)

    def form_of(self, features: HeadFeatures) -> HeadForm:
        """The form of the head with other features."""
        form = HeadForm(features, LATER_OUTPUTS, LATER_TOKENS, self.scaled)
        return form if form.reads_tokens else replace(form, tokens=0)


def check_head(options: HeadOptions) -> HeadOptions:
    """Return the options if they go together.

    Raises:
        UsageError: ``scaled`` without a range, whose features would be the same twice.
    """
    if options.scaled and options.scales is None:
        raise UsageError("+head: option scaled needs a range of guidance scales; add scales=LO..HI")
    return options


def with_images(
    options: HeadOptions, calibrate: int | None, spec: ModelSpec, steps: int
) -> HeadOptions:
    """The options with a number of images: their own, else ``calibrate``, else the default.

    Raises:
        UsageError: ``calibrate`` is too small for a held-out image, or the model draws videos.
    """
    if spec.video:
        raise UsageError("+head: heads correct images; leave +head out for a model of videos")
    if options.images is not None:
        return options
    if calibrate is None:
        return replace(options, images=default_head_images(spec, steps))
    if calibrate < HELD_OUT_EVERY:
        raise UsageError(
            f"+head: needs at least {HELD_OUT_EVERY} calibration images, got {calibrate}"
        )
    return replace(options, images=calibrate)


def default_head_images(spec: ModelSpec, steps: int) -> int:
    """Default number of images: 512, or what ``HEAD_FLOPS`` pay for, at least 16."""
    paid = HEAD_FLOPS // (steps * full_step_flops(spec, 2))
    return max(FEWEST_DEFAULT_IMAGES, min(DEFAULT_HEAD_IMAGES, paid))


def computed_steps(schedule: Schedule) -> tuple[int, ...]:
    """The steps that compute a unit."""
    return tuple(step for step, rows in enumerate(schedule.coefficients) if COMPUTE in rows)


def without_predicted_steps(schedule: Schedule) -> Schedule:
    """The schedule that has only the computed steps, each of which computes every unit.

    Raises:
        UsageError: a step computes some units and predicts others.
    """
    kept = computed_steps(schedule)
    rows = tuple(schedule.coefficients[step] for step in kept)
    for step, row in zip(kept, rows, strict=True):
        if any(row):
            raise UsageError(
                f"+head: option skip_predicted needs steps that compute every unit or none, but "
                f"step {step} predicts some; use a base that computes whole steps, such as fora:2"
            )
    return Schedule(
        schedule.depth,
        schedule.branches,
        rows,
        policy=schedule.policy,
        provenance=schedule.provenance,
        blocks=schedule.blocks,
    )
