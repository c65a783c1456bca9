"""The runtime as a library: load an engine directory, generate images, from any number of threads."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.conditions.captions import (
    Conditions,
    PromptEmbeds,
    blank_captions,
)
from goc_deploy.conditions.text import NO_TOKENIZERS, TextEncoder
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.options import GenerateOptions
from goc_deploy.protocols import Backend
from goc_deploy.runtime import arguments
from goc_deploy.runtime.binding import Engines
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.images import images_from_latents
from goc_deploy.runtime.interpreter_exit import native_calls
from goc_deploy.runtime.request import Batch, Drawing, Request
from goc_deploy.runtime.results import Drawn, Result, plan_report, timing_report
from goc_deploy.runtime.session import Session
from goc_deploy.runtime.session_pool import CLOSED, SessionPool
from goc_deploy.runtime.step_events import StepHook, step_callback
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span, recorded
from goc_deploy.version import __version__

DEFAULTS = GenerateOptions()


@dataclass(frozen=True, slots=True)
class Attached:
    """What comes before and after the sampler, where the engine directory has it."""

    decoder: LatentDecoder | None = None
    text: TextEncoder | None = None


NOTHING_ATTACHED = Attached()


class Pipeline:
    """A plan of a loaded engine directory. Thread-safe; at most ``max_sessions`` callers run at a time, others wait.

    Make one with `goc_deploy.load`.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        engines: Engines,
        backend: Backend,
        batch_size: int,
        max_sessions: int,
        attached: Attached = NOTHING_ATTACHED,
    ) -> None:
        self._pid = os.getpid()
        self._attached = attached
        self._backend, self._engines = backend, engines
        self.manifest, self.plan, self.batch_size = manifest, plan, batch_size
        self.spec: ModelSpec = manifest.model
        self._pool = SessionPool(max_sessions)
        with engines.weights.running():
            self._pool.run(self._new_session, lambda _: None)

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] = ("",),
        captions: PromptEmbeds | None = None,
        seed: int | Sequence[int] = DEFAULTS.seed,
        first_image: int = 0,
        cfg_scale: float | Sequence[float] = DEFAULTS.cfg_scale,
        cfg_channels: int | None = DEFAULTS.cfg_channels,
        latents: np.ndarray | None = None,
        trajectory: bool = False,
        decode: bool = True,
        callback: StepHook | None = None,
        spans: list[Span] | None = None,
    ) -> Result:
        """Generate one image per label, or per caption.

        Args:
            labels: class labels, 0 .. classes - 1. Of a model that draws captions: which of ``prompts`` or ``captions``, by
                default each once, or without these which of the captions that the engine directory keeps.
            prompts: texts, where the engine has a text encoder. A text with too many tokens is cut; the log says where.
            negative_prompts: what to draw away from: one for all, or one for each.
            captions: embeddings that `goc_deploy.conditions.captions.prompt_embeds_from_arrays` checked.
            seed: image i gets noise from (seed, first_image + i) alone, whatever the batch size. Or one per image: image i then
                gets noise from (seed[i], first_image), for the steps of a stochastic sampler too, as in a request of its own with
                that seed. Equal seeds mean equal noise.
            first_image: where this request starts in a longer series of images that share a seed.
            cfg_scale: classifier-free guidance scale, 0..1000; 1 is none. Or one per image: images of different scales share a
                batch. An image of scale 1 among others is what it is alone, but takes their time.
            cfg_channels: guidance acts on the first channels only; None is what the model's reference does.
            latents: x_T instead of seeded noise, (N, C, H, W), converted to float32.
            trajectory: also return the latents after every step.
            decode: turn latents into images where the engine has a decoder.
            callback: called after every step with a `StepEvent`; an exception in it is logged and the run goes on.
            spans: where to record what ran when, for `goc_deploy.trace`.

        Raises:
            UsageError: a label, number or shape out of range, another number of seeds or scales than images, or captions for a
                model that draws classes.
            VerificationError: a result is not finite.
            EnvironmentUnsupportedError: the pipeline was closed, or inherited over a fork.
        """
        self._check_open()
        if prompts is not None:
            captions = self.encode(prompts, negative_prompts)
        seed, cfg_scale = arguments.checked_seed(seed), arguments.checked_scale(cfg_scale)
        cfg_channels = self.spec.guided_channels if cfg_channels is None else cfg_channels
        drawing = self._drawing(
            labels, captions, seed, first_image, cfg_scale, cfg_channels, latents
        )
        drawn = Drawn()

        def run_batches(session: Session) -> None:
            for first in range(0, len(drawing), self.batch_size):
                part = range(first, min(first + self.batch_size, len(drawing)))
                taken: list[np.ndarray] = []
                on_step = None
                if callback is not None or trajectory or self._backend.device.kind == "cpu":
                    # Else nothing is called between steps: on a GPU a run is short.
                    on_step = step_callback(
                        self.plan, callback, taken if trajectory else None, part
                    )
                request = drawing.request(part, self._draws, self._latent_shape)
                final, timing = session.run(request, on_step, spans)
                drawn.batches.append(final)
                drawn.timings.append(timing)
                drawn.trajectories.append(taken)

        weights = self._engines.weights
        with weights.running():
            checkpoint = weights.checkpoint_sha256
            self._pool.run(self._new_session, run_batches, spans)
        final_latents = drawn.latents()
        started = time.perf_counter()
        pictures = self._images(final_latents, spans) if decode else None
        report = {
            "goc_deploy": __version__,
            **self._backend.describe(),
            **plan_report(self.plan, self.spec, self.manifest.precision, self.batch_size),
            "images": len(drawing),
            "seed": seed,
            "cfg_scale": cfg_scale,
            "cfg_channels": drawing.cfg_channels,
            **timing_report(self.plan, drawn.timings),
            "checkpoint_sha256": checkpoint,
            "decode_ms": 1e3 * (time.perf_counter() - started),
        }
        whole = drawn.trajectory() if trajectory else None
        return Result(pictures, final_latents, whole, report)

    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] = ("",)
    ) -> PromptEmbeds:
        """Encode prompts; the last ones are remembered.

        Raises:
            UsageError: the engine has no text encoder, or no prompts are given, or another number of negative ones.
            EnvironmentUnsupportedError: the package tokenizers is missing.
        """
        if self.manifest.text is None:
            raise UsageError(
                "the engine has no text encoder; export with `text_encoder`, or give prompt embeddings"
            )
        if self._attached.text is None:
            raise EnvironmentUnsupportedError(NO_TOKENIZERS)
        with native_calls():
            return self._attached.text.prompt_embeds(prompts, negative_prompts)

    def with_plan(self, plan: Plan) -> Pipeline:
        """A pipeline of another plan on the same engines, which must hold the graphs that it launches: its predict graphs
        (a plan that computes everything has none) and units, or its segments."""
        return Pipeline(
            self.manifest, plan, self._engines, self._backend, self.batch_size, 1, self._attached
        )

    def load_weights(self, engine_dir: str | Path) -> None:
        """Exchange the weights for those of another engine directory, such as a fine-tune's, without building engines.

        Requests that run now end first, later ones wait. All pipelines on the same engines have the new weights then, and
        results tell which these are (``checkpoint_sha256`` in the report). Plans stay, though they may have been learned from
        other weights; so do a VAE's decoder, a text encoder, and captions that stand for labels. TensorRT engines with shared
        weights get new values at the same addresses, and recorded steps stay; ONNX Runtime loads one graph after the other
        again, and drops the one before first, so that memory holds at most the old or the new weights of each.

        Args:
            engine_dir: an export of the same architecture, sizes and precision by the same version of the exporter.

        Raises:
            UsageError: its model, precision or graphs differ; the message says what does. Or a callback of a request calls it.
            EngineDirError, SafetyError: a file is missing, corrupt or not ours.
            EnvironmentUnsupportedError: TensorRT engines hold their weights, or the pipeline was closed.
            ResourceError: there is not enough memory.
            GocError: whatever is raised, the weights are those from before.
        """
        from goc_deploy.runtime.exchange import load_weights

        self._check_open()
        load_weights(Path(engine_dir), self._engines, self._backend)

    def warmup(self, images: Sequence[int] = (1,), *, guided: Sequence[bool] = (True,)) -> None:
        """Run every session as often as it takes until nothing is compiled or recorded for requests like these.

        It waits for each session, one after the other.

        Args:
            images: sizes of the requests, each within the batch size; ``(1, batch_size)`` also warms a full batch.
            guided: whether they are guided.

        Raises:
            UsageError: a size that is not within 1..batch_size.
            EnvironmentUnsupportedError: the pipeline was closed, or inherited over a fork.
        """
        self._check_open()
        for size in images:
            if not arguments.is_whole(size) or not 1 <= size <= self.batch_size:
                raise UsageError(
                    f"images to warm up with must be within 1..{self.batch_size}, got {size!r}"
                )
        requests = [
            self._request_to_warm_up(size, guided=is_guided)
            for size, is_guided in product(images, guided)
        ]

        def run_each(session: Session) -> None:
            for request, _ in product(requests, range(self.runs_to_warm)):
                session.run(request)

        with self._engines.weights.running():
            self._pool.run_on_each(self._new_session, run_each)
        if self._attached.decoder is not None:
            for size in images:
                self._attached.decoder.images(np.zeros((size, *self._latent_shape), np.float32))

    @property
    def runs_to_warm(self) -> int:
        """Requests of a shape after which the next one finds everything there: a GPU records what ran once."""
        return 1 if self._backend.device.kind == "cpu" else 2

    def _request_to_warm_up(self, images: int, *, guided: bool) -> Request:
        captions = blank_captions(self.spec) if self.spec.draws_captions else None
        labels = [0] * images if captions else [i % self.spec.classes for i in range(images)]
        conditions = self._conditions(labels, captions, guided=guided)
        noise = np.zeros((images, self._draws, *self._latent_shape), np.float32)
        scales = np.full(images, DEFAULTS.cfg_scale if guided else 1.0)
        return Request(conditions, noise, scales, self.spec.guided_channels)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, after which every request raises."""
        return self._pool.closed

    def close(self) -> None:
        """Free the engines and buffers; later and waiting calls raise, running ones end. Closing twice is fine."""
        self._pool.close()
        self._engines = Engines({}, {})

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loaded pipeline cannot be pickled; load the engine directory in the other process"
        )

    @property
    def _draws(self) -> int:
        """Noise tensors of an image: x_T, and one per step of a stochastic sampler."""
        return 1 + (self.plan.steps if self.plan.sampler.stochastic else 0)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return (self.spec.channels, self.spec.side, self.spec.side)

    def _images(self, latents: np.ndarray, spans: list[Span] | None) -> np.ndarray | None:
        if self._attached.decoder is None:
            return images_from_latents(latents)
        with recorded(spans, "decode", f"decode {len(latents)} images"), native_calls():
            return self._attached.decoder.images(latents)

    def _drawing(
        self,
        labels: Sequence[int] | None,
        captions: PromptEmbeds | None,
        seed: int | list[int],
        first_image: int,
        cfg_scale: float | list[float],
        cfg_channels: int,
        latents: np.ndarray | None,
    ) -> Drawing:
        """Check what each image gets; see `generate`."""
        arguments.check_channels(cfg_channels)
        guided = bool(np.any(np.not_equal(cfg_scale, 1))) and cfg_channels != 0
        conditions = self._conditions(labels, captions, guided=guided)
        images = len(conditions.labels)
        return Drawing(
            conditions,
            arguments.noise_keys(seed, first_image, images),
            arguments.scale_of_each(cfg_scale, images),
            int(cfg_channels),
            None if latents is None else arguments.checked_latents(latents, images, self.spec),
        )

    def _conditions(
        self, labels: Sequence[int] | None, captions: PromptEmbeds | None, *, guided: bool
    ) -> Conditions:
        stored = self._engines.captions
        return arguments.conditions(labels, captions, self.spec, stored, guided=guided)

    def _check_open(self) -> None:
        if self._pool.closed:
            raise EnvironmentUnsupportedError(CLOSED)
        if os.getpid() != self._pid:
            raise EnvironmentUnsupportedError(
                "the pipeline was loaded before a fork, which its threads do not survive; load after forking"
            )

    def _new_session(self) -> Session:
        session = Session(
            self._engines,
            self._backend,
            self.spec,
            self.manifest.precision,
            self.plan,
            self.batch_size,
        )
        captions = self.spec.draws_captions
        session.bind(Batch(1, True, labels=1 if captions else 2, captions=2 if captions else 0))
        self._engines.weights.sessions.add(session)
        return session
