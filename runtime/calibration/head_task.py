"""What a fit of a head is told: the plan, the calibration images, and whose latents to aim at."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from goc_deploy.conditions.captions import Conditions, PromptEmbeds, conditions_from_labels
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.policies.head import HELD_OUT_EVERY
from goc_deploy.runtime.request import Drawing
from goc_deploy.samplers import SamplerTable
from goc_deploy.samplers.head import HeadForm
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Teacher:
    """Whose latents a head aims at: a sampler that computes everything.

    Attributes:
        table: its sampler.
        places: [T] for each step of the plan, how many of the teacher's steps lead to the latents
            that the step aims at.
    """

    table: SamplerTable
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeadTask:
    """What to fit.

    Attributes:
        schedule: what the plan computes.
        table: the sampler of the plan.
        teacher: whose latents the head aims at.
        form: what the head reads.
        images: number of calibration images; every eighth is held out.
        seed: seed of labels and noise.
        cfg_scales: smallest and largest guidance scale.
        cfg_channels: guidance acts on the first channels only.
        judges: how many images, the last ones, the fit does not see at all. They are corrected like
            the others, for the errors of a trial.
    """

    schedule: Schedule
    table: SamplerTable
    teacher: Teacher
    form: HeadForm
    images: int
    seed: int
    cfg_scales: tuple[float, float]
    cfg_channels: int
    judges: int = 0

    @property
    def decides(self) -> tuple[object, ...]:
        """Everything that decides the result, without names and records for people."""
        schedule = self.schedule
        kinds = (schedule.branches_of_blocks, schedule.history, schedule.level)
        return (*kinds, schedule.coefficients, self.table, self.teacher, *self._kinds_of_images)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """T + 1 digests: of everything that decides the latents and the state before each step.

        Tasks with an equal digest reach the same state, whatever follows.
        """
        schedule, table = self.schedule, self.table
        depth = schedule.history_depth
        kinds = (schedule.branches_of_blocks, schedule.history, schedule.level, depth)
        digest = sha256(
            repr((kinds, self.teacher.table, table.start, self._kinds_of_images)).encode()
        )
        names = [digest.hexdigest()[:32]]
        for step in range(table.steps):
            update = (table.timesteps, table.latent, table.model, table.estimate)
            decides = (schedule.coefficients[step], *(row[step] for row in update))
            lags = table.lag_coefficients[step] if table.lag_coefficients else ()
            digest.update(repr((*decides, lags, self.teacher.places[step])).encode())
            names.append(digest.hexdigest()[:32])
        return tuple(names)

    @property
    def _kinds_of_images(self) -> tuple[object, ...]:
        more = (self.seed, self.cfg_scales, self.cfg_channels, self.judges)
        return (self.form, self.images, *more)

    @property
    def held_out(self) -> np.ndarray:
        """(N,) bool: the images that only judge."""
        return np.asarray(np.arange(self.images) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

    def drawing(self, spec: ModelSpec, stored: PromptEmbeds | None) -> Drawing:
        """The calibration images of a model, with the stored captions of its engine directory."""
        labels = balanced_labels(spec.choices, self.images, self.seed)
        return Drawing(
            conditions_from_labels(labels, spec, stored),
            [(self.seed, image) for image in range(self.images)],
            spread_scales(*self.cfg_scales, self.images),
            self.cfg_channels,
            spec.latents,
        )


def chosen(drawing: Drawing, images: np.ndarray) -> Drawing:
    """The images (N,) bool of a drawing."""
    kept, told = np.flatnonzero(images).tolist(), drawing.conditions
    labels, nulls = (tuple(row[i] for i in kept) for row in (told.labels, told.nulls))
    return Drawing(
        Conditions(labels, nulls, told.captions),
        [drawing.noise_keys[i] for i in kept],
        drawing.cfg_scale[kept],
        drawing.cfg_channels,
        drawing.shape,
    )


def spread_scales(lowest: float, highest: float, images: int) -> np.ndarray:
    """Guidance scales of images, (N,) float64, so that any run of images covers the range."""
    return lowest + (highest - lowest) * (np.arange(images) * GOLDEN_RATIO % 1.0)
