"""Images of a series, a batch at a time, so that each batch can be kept as it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy.conditions.captions import PromptEmbeds, captions_to_bytes, check_rows
from goc_deploy.errors import UsageError
from goc_deploy.options import GenerateOptions, Progress

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline
    from goc_deploy.runtime.results import Result
    from goc_deploy.runtime.step_events import StepEvent


@dataclass(frozen=True, slots=True)
class Series:
    """What to draw.

    Attributes:
        labels: one per image.
        options: of all of them.
        captions: what the labels choose from, or None.
        latents: (N, C, H, W) x_T, or None for seeded noise.
    """

    labels: Sequence[int]
    options: GenerateOptions
    captions: PromptEmbeds | None = None
    latents: np.ndarray | None = None

    def check(self, pipe: Pipeline) -> None:
        """Refuse what a later batch would stumble over.

        Raises:
            UsageError: a label that does not exist, or another number of latents than of images.
        """
        spec, images = pipe.spec, len(self.labels)
        if self.captions is None and spec.classes:
            check_rows(self.labels, spec.classes)
        elif self.captions is not None:
            check_rows(self.labels, len(self.captions.prompts))
        if self.latents is not None and len(self.latents) != images:
            shape = [images, spec.channels, spec.side, spec.side]
            raise UsageError(
                f"latents have shape {list(self.latents.shape)}, expected {shape} for {images} labels"
            )

    def records(
        self, pipe: Pipeline, prompts: Sequence[str] = (), negatives: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """What each image is made from, in JSON types; ``prompts`` and ``negatives`` are what the captions were, if known."""
        plan, manifest = pipe.plan, pipe.manifest
        channels = self.options.cfg_channels
        common: dict[str, Any] = {
            "plan": plan.name,
            "policy": plan.schedule.policy,
            "steps": plan.steps,
            "sampler": plan.sampler.sampler,
            "precision": manifest.precision,
            "checkpoint": manifest.provenance.get("checkpoint_sha256"),
            "cfg_scale": self.options.cfg_scale,
            "cfg_channels": pipe.spec.guided_channels if channels is None else channels,
            "seed": self.options.seed,
        }
        if self.latents is not None:
            del common["seed"]
            common["latents_sha256"] = hashlib.sha256(
                np.ascontiguousarray(self.latents).tobytes()
            ).hexdigest()
        if self.captions is not None and not prompts:
            common["captions_sha256"] = hashlib.sha256(captions_to_bytes(self.captions)).hexdigest()

        def drawn(label: int) -> dict[str, Any]:
            if not prompts:
                return {"label": int(label)}
            negative = negatives[label if len(negatives) > 1 else 0] if negatives else ""
            return {"prompt": prompts[label], "negative_prompt": negative}

        return [{**common, "image": i, **drawn(label)} for i, label in enumerate(self.labels)]

    def results(
        self, pipe: Pipeline, start: int, progress: Progress, *, trajectory: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index of the first image, its batch) from image ``start`` on."""
        total = (len(self.labels) - start) * pipe.plan.steps
        for first in range(start, len(self.labels), pipe.batch_size):
            part = slice(first, first + pipe.batch_size)
            result = pipe.generate(
                self.labels[part],
                captions=self.captions,
                seed=self.options.seed,
                first_image=first,
                cfg_scale=self.options.cfg_scale,
                cfg_channels=self.options.cfg_channels,
                latents=None if self.latents is None else self.latents[part],
                trajectory=trajectory,
                callback=_step_callback(progress, first, (first - start) * pipe.plan.steps, total),
            )
            yield first, result


def _step_callback(
    progress: Progress, first: int, done: int, total: int
) -> Callable[[StepEvent], None]:
    def show(event: StepEvent) -> None:
        what = f"steps of images {first + 1}-{first + event.images}"
        progress(what, done + (event.step + 1) * event.images, total)

    return show


def joined_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of batches that were run one after the other."""
    summed = {
        key: sum(report[key] for report in reports) for key in ("images", "total_ms", "decode_ms")
    }
    return {
        **reports[0],
        **summed,
        "batches": [batch for report in reports for batch in report["batches"]],
    }
