"""Images of an engine directory to files: the work behind goc-run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy import disk
from goc_deploy.api.facade import load
from goc_deploy.api.series import Series, joined_report, step_callback
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.conditions.labels import labels_from_text, spread_labels
from goc_deploy.conditions.references import references_from_arrays
from goc_deploy.conditions.tensor_files import arrays_from_file, latents_from_file
from goc_deploy.errors import UsageError
from goc_deploy.options import VIDEO_SUFFIXES, Progress, RunOptions, no_progress
from goc_deploy.runtime.picture_files import PictureFiles, finished_pictures
from goc_deploy.runtime.video_files import check_video_output, video_path, write_video

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline
    from goc_deploy.runtime.results import Result


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `run` did.

    Attributes:
        images: number of images of the series.
        report: report of the batches that ran, or None if every image was there before.
        paths: the outputs, in the order of the fields of `RunOptions`.
        latents_instead: where the latents of a model without decoder were written in place of
            images, or None.
        channels: number of latent channels if the engine directory has no decoder, or None.
    """

    images: int
    report: dict[str, Any] | None
    paths: tuple[Path, ...]
    latents_instead: Path | None
    channels: int | None


def run(engine_dir: str | Path, options: RunOptions, progress: Progress = no_progress) -> RunResult:
    """Draw a series of images batch by batch, and write each batch when it is drawn.

    Args:
        engine_dir: the directory that `goc_deploy.export` wrote.
        options: what to draw, on which backend, and the files to write.
        progress: called with (what, done, total).

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    _check(options)
    with opened(engine_dir, options) as (pipe, series), _Outputs(pipe, series) as outputs:
        labels = series.labels
        total = (len(labels) - outputs.start) * pipe.plan.steps
        for first in range(outputs.start, len(labels), pipe.batch_size):
            done = (first - outputs.start) * pipe.plan.steps
            callback = step_callback(progress, first, done, total)
            outputs.add(first, series.batch(pipe, first, callback))
        return outputs.finished()


@contextmanager
def opened(engine_dir: str | Path, options: RunOptions) -> Iterator[tuple[Pipeline, Series]]:
    """Load what options ask for, and check the series of images.

    Yields:
        The pipeline, which is closed at the end, and the series.

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    latents = None if options.latents is None else latents_from_file(options.latents)
    embeds = None if options.prompt_embeds is None else arrays_from_file(options.prompt_embeds)
    references = None
    if options.reference_latents is not None:
        arrays = arrays_from_file(options.reference_latents)
        references = references_from_arrays(arrays, str(options.reference_latents))
    with _loaded(engine_dir, options) as pipe:
        series = replace(_series(pipe, options, latents, embeds), references=references)
        series.check(pipe)
        yield pipe, series


def _check(options: RunOptions) -> None:
    """Refuse options that contradict each other."""
    folder = options.output is not None and options.output.suffix == ""
    arrays = options.latents_output or options.trajectory_output
    if options.resume and (not folder or arrays):
        raise UsageError(
            "`resume` goes with a directory as `output`, and with no output of latents"
        )
    twice = options.prompts and options.prompt_embeds is not None
    if twice or (options.negative_prompts and not options.prompts):
        raise UsageError(
            "give `prompts` or `prompt_embeds`, not both; `negative_prompts` goes with `prompts`"
        )


def _loaded(engine_dir: str | Path, options: RunOptions) -> Pipeline:
    return load(
        engine_dir,
        backend=options.backend,
        plan=options.plan,
        steps=options.steps,
        batch_size=options.batch_size,
        threads=options.threads,
        cuda_graphs=options.cuda_graphs,
        device=options.device,
        history=options.history,
        offload=options.offload,
    )


def _series(
    pipe: Pipeline,
    options: RunOptions,
    latents: np.ndarray | None,
    embeds: Mapping[str, np.ndarray] | None,
) -> Series:
    """What each image shows, once the model is known."""
    captions = None
    if embeds is not None:
        captions = prompt_embeds_from_arrays(embeds, pipe.spec, str(options.prompt_embeds))
    elif options.prompts:
        captions = pipe.encode(options.prompts, options.negative_prompts or ("",))
    rows = None
    if options.labels is not None:
        rows = labels_from_text(options.labels, pipe.manifest.class_names)
    elif captions is not None:
        rows = tuple(range(len(captions.prompts)))
    images = options.num_images or (None if latents is None else len(latents))
    return Series(options, spread_labels(rows, images, pipe.spec.choices), captions, latents)


def _check_kind(options: RunOptions, *, videos: bool) -> None:
    """Refuse outputs that are not for what the model draws."""
    suffix = "" if options.output is None else options.output.suffix.lower()
    if videos and (options.resume or suffix in (".png", ".npz")):
        raise UsageError(
            "the model draws videos; choose an `output` that ends in .mp4 or .webp, or a directory "
            "of frames, and leave out `resume`"
        )
    if not videos and suffix in VIDEO_SUFFIXES:
        raise UsageError(
            f"{options.output}: the model draws no videos; choose an `output` that ends in .png or "
            ".npz, or a directory"
        )


class _Outputs:
    """The files of a run, made in a ``with``: pictures as they come, the others at the end.

    Attributes:
        start: index of the first image to draw; an interrupted run left the images before it.
    """

    def __init__(self, pipe: Pipeline, series: Series) -> None:
        self._pipe, self._series, self._options = pipe, series, series.options
        self._draws = pipe.manifest.image_size is not None
        self._latents: list[np.ndarray] = []
        self._written: list[Path] = []
        self._trajectories: list[np.ndarray] = []
        self._reports: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._pictures: PictureFiles | None = None
        self.start = 0
        output, records = series.options.output, series.records(pipe)
        if series.options.resume and output:
            if not self._draws:
                raise UsageError(
                    "`resume` continues images, but the model makes latents; export with `vae`"
                )
            self.start = finished_pictures(output, records)
        self._videos = pipe.spec.video and self._draws
        _check_kind(series.options, videos=self._videos)
        if output and self._videos:
            check_video_output(output)
        if output and self._draws and not self._videos:
            self._pictures = PictureFiles(output, series.labels, records)

    def __enter__(self) -> _Outputs:
        if self._pictures is not None:
            self._stack.enter_context(self._pictures)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def add(self, first: int, result: Result) -> None:
        """Take the results of the batch that starts at image ``first``."""
        self._reports.append(result.report)
        if self._pictures is not None and result.images is not None:
            self._pictures.add(first, result.images)
        if self._videos and self._options.output is not None:
            assert result.images is not None
            for i, frames in enumerate(result.images, first):
                path = video_path(self._options.output, i, len(self._series.labels))
                write_video(path, frames, self._options.fps)
                self._written.append(path)
        if self._options.latents_output is not None or not self._draws:
            self._latents.append(result.latents)
        if result.trajectory is not None:
            self._trajectories.append(result.trajectory)

    def finished(self) -> RunResult:
        """Write the arrays and the report."""
        options, paths = self._options, []
        instead = None
        if self._videos:
            paths += self._written
        elif self._draws and options.output:
            paths.append(options.output)
        elif options.output and not options.latents_output:
            instead = options.output.with_suffix(".npy")
            paths.append(instead)
        if target := options.latents_output or instead:
            disk.save_array(np.concatenate(self._latents), target)
        if options.latents_output:
            paths.append(options.latents_output)
        if options.trajectory_output:
            disk.save_array(np.concatenate(self._trajectories, axis=1), options.trajectory_output)
            paths.append(options.trajectory_output)
        report = joined_report(self._reports) if self._reports else None
        if report and options.report:
            disk.save_text(json.dumps(report, indent=1) + "\n", options.report)
            paths.append(options.report)
        channels = None if self._draws else self._pipe.spec.channels
        return RunResult(len(self._series.labels), report, tuple(paths), instead, channels)
