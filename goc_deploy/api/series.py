"""A series of images: what it is made from, and one report for all of its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy.conditions.captions import PromptEmbeds, check_rows
from goc_deploy.conditions.references import checked_references
from goc_deploy.conditions.stored_captions import captions_to_bytes
from goc_deploy.errors import UsageError
from goc_deploy.guidance import cfg_scale_of, skip_window
from goc_deploy.options import Progress, RunOptions
from goc_deploy.runtime import arguments

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline
    from goc_deploy.runtime.results import Result
    from goc_deploy.runtime.step_events import StepEvent


@dataclass(frozen=True, slots=True)
class Series:
    """The images of one call of `goc_deploy.api.run.run`.

    Attributes:
        options: the options of the caller.
        labels: one label per image.
        captions: the captions that the labels select, or None.
        latents: (N, C, H, W) x_T, or None for seeded noise.
        references: (N or 1, C, H, W) latents of each reference image, or None.
    """

    options: RunOptions
    labels: Sequence[int]
    captions: PromptEmbeds | None = None
    latents: np.ndarray | None = None
    references: tuple[np.ndarray, ...] | None = None

    def check(self, pipe: Pipeline) -> None:
        """Refuse in advance what a later batch would fail on.

        Raises:
            UsageError: a label that does not exist, another number of latents than of images, a
                guidance scale that the model does not have, or reference images that it cannot
                read.
        """
        spec, images = pipe.spec, len(self.labels)
        if self.captions is None and spec.choices:
            check_rows(self.labels, spec.choices)
        elif self.captions is not None:
            check_rows(self.labels, len(self.captions.prompts))
        arguments.embedded_guidance(self.options.guidance, spec)
        second = arguments.second_scale(self.options.cfg_scale_2, spec)
        _, _, guided = arguments.guidance(
            self.options.cfg_scale, self.options.cfg_channels, spec, second
        )
        arguments.skip_guidance(self.options.skip_layer_guidance, spec, pipe.plan, guided=guided)
        checked_references(self.references, images, spec)
        if self.latents is not None and len(self.latents) != images:
            shape = [images, *spec.latents]
            raise UsageError(
                f"latents have shape {list(self.latents.shape)}, "
                f"expected {shape} for {images} labels"
            )

    def batch(
        self, pipe: Pipeline, first: int, callback: Callable[[StepEvent], None] | None = None
    ) -> Result:
        """Draw the batch of images that starts with one of the series.

        Args:
            pipe: the pipeline, whose batch size decides how many images follow.
            first: index of the first image.
            callback: as `goc_deploy.runtime.pipeline.Pipeline.generate` takes it.

        Raises:
            GocError: as `goc_deploy.runtime.pipeline.Pipeline.generate`.
        """
        options, rows = self.options, slice(first, first + pipe.batch_size)
        return pipe.generate(
            self.labels[rows],
            prompt_embeds=self.captions,
            seed=options.seed,
            first_image=first,
            cfg_scale=options.cfg_scale,
            cfg_channels=options.cfg_channels,
            guidance=options.guidance,
            cfg_scale_2=options.cfg_scale_2,
            skip_layer_guidance=options.skip_layer_guidance,
            latents=None if self.latents is None else self.latents[rows],
            reference_latents=self._references(rows),
            size=options.size,
            frames=options.frames,
            trajectory=options.trajectory_output is not None,
            callback=callback,
        )

    def _references(self, rows: slice) -> list[np.ndarray] | None:
        """The latents of the reference images of a batch."""
        if self.references is None:
            return None
        return [latents if len(latents) == 1 else latents[rows] for latents in self.references]

    def records(self, pipe: Pipeline) -> list[dict[str, Any]]:
        """What each image is made from, in JSON types."""
        plan, manifest, options = pipe.plan, pipe.manifest, self.options
        channels = options.cfg_channels
        common: dict[str, Any] = {
            "plan": plan.name,
            "policy": plan.schedule.policy,
            "steps": plan.steps,
            "sampler": plan.sampler.sampler,
            "precision": manifest.precision,
            "checkpoint": manifest.provenance.get("checkpoint_sha256"),
            "cfg_scale": cfg_scale_of(options.cfg_scale, pipe.spec),
            "cfg_channels": pipe.spec.guided_channels if channels is None else channels,
            "seed": options.seed,
        }
        if pipe.spec.embedded_guidance:
            common["guidance"] = arguments.embedded_guidance(options.guidance, pipe.spec)
        if options.cfg_scale_2 is not None:
            common["cfg_scale_2"] = options.cfg_scale_2
        if options.skip_layer_guidance is not None:
            common["skip_layer_guidance"] = list(skip_window(options.skip_layer_guidance))
        if options.size is not None:
            common["size"] = list(options.size)
        if options.frames is not None:
            common["frames"] = options.frames
        if self.latents is not None:
            del common["seed"]
            values = np.ascontiguousarray(self.latents).tobytes()
            common["latents_sha256"] = hashlib.sha256(values).hexdigest()
        if self.references is not None:
            digest = hashlib.sha256()
            for latents in self.references:
                digest.update(f"{latents.dtype} {latents.shape}".encode())
                digest.update(np.ascontiguousarray(latents).tobytes())
            common["references_sha256"] = digest.hexdigest()
        if self.captions is not None and not options.prompts:
            common["captions_sha256"] = hashlib.sha256(captions_to_bytes(self.captions)).hexdigest()
        return [
            {**common, "image": i, **self._condition(label)} for i, label in enumerate(self.labels)
        ]

    def _condition(self, label: int) -> dict[str, Any]:
        """What one image shows, in the words of the caller."""
        prompts, negatives = self.options.prompts, self.options.negative_prompts or ("",)
        if not prompts:
            return {"label": int(label)}
        negative = negatives[label if len(negatives) > 1 else 0]
        return {"prompt": prompts[label], "negative_prompt": negative}


def step_callback(
    progress: Progress, first: int, done: int, total: int
) -> Callable[[StepEvent], None]:
    """A callback of `Pipeline.generate` that reports the progress of a whole series.

    Args:
        progress: called with (what, done, total).
        first: index of the first image of the batch in the series.
        done: steps times images that earlier batches took.
        total: steps times images of the series.
    """

    def show(event: StepEvent) -> None:
        what = f"steps of images {first + 1}-{first + event.images}"
        progress(what, done + (event.step + 1) * event.images, total)

    return show


def joined_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of batches that ran one after the other."""
    summed = {
        key: sum(report[key] for report in reports) for key in ("images", "total_ms", "decode_ms")
    }
    return {
        **reports[0],
        **summed,
        "batches": [batch for report in reports for batch in report["batches"]],
    }
