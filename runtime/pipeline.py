"""The runtime as a library: generating images with a loaded plan, from any number of threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from goc_deploy.cancellation import CancelToken, call_limits
from goc_deploy.compiler import Plan
from goc_deploy.conditions.captions import (
    Conditions,
    PromptEmbeds,
    blank_captions,
)
from goc_deploy.conditions.references import blank_references, checked_references
from goc_deploy.conditions.text import TextEncoder
from goc_deploy.conditions.tokens import NO_TOKENIZERS
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.guidance import CFG_SCALE
from goc_deploy.options import GenerateOptions, SkipGuidance
from goc_deploy.protocols import NOTHING, Backend
from goc_deploy.runtime import arguments
from goc_deploy.runtime.asynchronous import in_a_thread
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.generation import Extras, Generation, OnNonfinite
from goc_deploy.runtime.head_use import HeadUse
from goc_deploy.runtime.interpreter_exit import native_calls
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.request import Batch, Drawing, Request
from goc_deploy.runtime.results import Result, plan_report, size_report
from goc_deploy.runtime.session import Session
from goc_deploy.runtime.session_pool import CLOSED, SessionPool
from goc_deploy.runtime.step_events import StepHook
from goc_deploy.runtime.video_decoder import VideoDecoder
from goc_deploy.sizes import latent_shape
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span
from goc_deploy.version import __version__

DEFAULTS, NO_EXTRAS = GenerateOptions(), Extras()


@dataclass(frozen=True, slots=True)
class Attached:
    """The optional parts of an engine directory: decoder of a VAE, and text encoder."""

    decoder: LatentDecoder | VideoDecoder | None = None
    text: TextEncoder | None = None


NOTHING_ATTACHED = Attached()


class Pipeline:
    """A plan of a loaded engine directory; `goc_deploy.load` returns one.

    A pipeline is thread-safe. At most ``max_sessions`` callers run at a time; others wait.

    Attributes:
        manifest: the contents of the engine directory.
        plan: the plan that runs.
        batch_size: the largest number of images of a run.
        spec: sizes of the model.
        engines: the loaded engines, which pipelines of one load share.
        backend: the backend of the engines.
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
        self.backend, self.engines = backend, engines
        self.manifest, self.plan, self.batch_size = manifest, plan, batch_size
        self.spec: ModelSpec = manifest.model
        self._head_use = HeadUse(plan, engines.weights)
        self._pool = SessionPool(max_sessions)
        with engines.weights.running():
            self._pool.run(self.new_session, lambda _: None)

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] = ("",),
        prompt_embeds: PromptEmbeds | None = None,
        seed: int | Sequence[int] = DEFAULTS.seed,
        first_image: int = 0,
        cfg_scale: float | Sequence[float] | None = DEFAULTS.cfg_scale,
        cfg_channels: int | None = DEFAULTS.cfg_channels,
        guidance: float | None = DEFAULTS.guidance,
        cfg_scale_2: float | None = DEFAULTS.cfg_scale_2,
        skip_layer_guidance: SkipGuidance | None = DEFAULTS.skip_layer_guidance,
        latents: np.ndarray | None = None,
        reference_latents: np.ndarray | Sequence[np.ndarray] | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        trajectory: bool = False,
        decode: bool = True,
        callback: StepHook | None = None,
        spans: list[Span] | None = None,
        deadline: float | None = None,
        cancel: CancelToken | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> Result:
        """Generate one image per label, or per caption.

        Args:
            labels: class labels, 0 .. classes - 1. For a text-conditional model: indices of
                ``prompts`` or ``prompt_embeds``, by default each index once; without these, indices
                of the stored captions.
            prompts: texts, if the engine directory has a text encoder. A text with too many tokens
                is truncated and logged.
            negative_prompts: prompts that the images should differ from: one for all images, or one
                for each prompt.
            prompt_embeds: prompt embeddings from
                `goc_deploy.conditions.captions.prompt_embeds_from_arrays`.
            seed: one seed, or one seed per image. With one seed, the noise of image i depends only
                on (seed, first_image + i), for every batch size. With one seed per image, it
                depends only on (seed[i], first_image), as in a request of one image; equal seeds
                mean equal noise. This includes the noise of a stochastic sampler.
            first_image: index of the first image, in a longer series of images that share a seed.
            cfg_scale: classifier-free guidance scale, 0..1000, or one scale per image; 1 means no
                guidance. Images of different scales share a batch. An image of scale 1 in such a
                batch is the same as without the others, but not faster. None is 4, or 1 for a model
                with embedded guidance.
            cfg_channels: number of channels that are guided, from the first; None is the number of
                the model's reference.
            guidance: guidance scale that a distilled model embeds, 0..1000, one for all images, as
                ``guidance_scale`` of diffusers' ``FluxPipeline``; None is 3.5.
            cfg_scale_2: guidance scale of the second set of weights of a model that has two, one
                for all images, as ``guidance_scale_2`` of diffusers' ``WanPipeline``; None is
                ``cfg_scale``.
            skip_layer_guidance: scale of skip-layer guidance, one for all images that are guided,
                as ``skip_layer_guidance_scale`` of diffusers' ``StableDiffusion3Pipeline``; or a
                tuple of the scale and the shares of the steps after which it starts and before
                which it stops, which are 0.01 and 0.2. None draws without it.
            latents: x_T in place of seeded noise, (N, C, H, W), or (N, C, F, H, W) for videos,
                converted to float32.
            reference_latents: latents of the images to edit, if the model edits images: an array
                (N, C, H, W), or a list of one per reference image, each as the encoder of the VAE
                makes and normalises them. One row in place of N is for all images. Their size may
                be another one than that of the images.
            size: width and height in pixels, if the engine directory accepts any size; None is its
                usual size.
            frames: number of frames of a video; None is the usual number.
            trajectory: whether the latents after every step are returned too.
            decode: whether latents are decoded to images, if the engine directory has a decoder.
            callback: called after every step with a `StepEvent`, which makes previews on request;
                an exception in it is logged, and the run continues.
            spans: list to which the times of all parts are appended, for `goc_deploy.trace`.
            deadline: seconds that the call may take, with the wait for a session; None is no limit.
            cancel: token with which another thread may end the call. It and the deadline are
                checked before every launch on the CPU, and before every step on a GPU, which then
                waits for each step. A token also interrupts a running launch of ONNX Runtime on the
                CPU. Other calls continue, and the session is usable at once.
            on_nonfinite: ``raise`` an error if the latents of any image are not finite, or ``mark``
                these images in ``errors`` of the result, so that the others are not lost.

        Raises:
            CancelledError: ``cancel`` was cancelled.
            DeadlineError: the call did not end in time.
            UsageError: a label, number or shape is out of range, the number of seeds or scales is
                not the number of images, or prompt embeddings are for a class-conditional model.
            VerificationError: a result is not finite, and ``on_nonfinite`` is ``raise``.
            EnvironmentUnsupportedError: the pipeline was closed, or was loaded before a fork.
        """
        self._check_open()
        limits = call_limits(deadline, cancel)
        arguments.check_choice("on_nonfinite", on_nonfinite, get_args(OnNonfinite))
        if prompts is not None:
            prompt_embeds = self.encode(prompts, negative_prompts)
        drawing = self.drawing(
            labels,
            prompt_embeds,
            seed=seed,
            first_image=first_image,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
            guidance=guidance,
            cfg_scale_2=cfg_scale_2,
            skip_layer_guidance=skip_layer_guidance,
            latents=latents,
            reference_latents=reference_latents,
            size=size,
            frames=frames,
        )
        scales, _, _ = arguments.guidance(cfg_scale, cfg_channels, self.spec)
        about: dict[str, Any] = {"seed": arguments.checked_seed(seed), "cfg_scale": scales}
        about |= {} if cfg_scale_2 is None else {"cfg_scale_2": drawing.cfg_scale_2}
        if drawing.skips is not None:
            about["skip_layer_guidance"] = drawing.skips.scale
            about["skip_layer_steps"] = list(drawing.skips.steps)
        extras = Extras(trajectory, decode, callback, spans, limits, on_nonfinite)
        return self.draw(drawing, extras, about)

    def drawing(
        self,
        labels: Sequence[int] | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        *,
        seed: int | Sequence[int] = DEFAULTS.seed,
        first_image: int = 0,
        cfg_scale: float | Sequence[float] | None = DEFAULTS.cfg_scale,
        cfg_channels: int | None = DEFAULTS.cfg_channels,
        guidance: float | None = DEFAULTS.guidance,
        cfg_scale_2: float | None = DEFAULTS.cfg_scale_2,
        skip_layer_guidance: SkipGuidance | None = DEFAULTS.skip_layer_guidance,
        latents: np.ndarray | None = None,
        reference_latents: np.ndarray | Sequence[np.ndarray] | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> Drawing:
        """Check the arguments of `generate` that concern single images, for `draw`.

        Raises:
            UsageError: as `generate`.
        """
        seeds = arguments.checked_seed(seed)
        second = arguments.second_scale(cfg_scale_2, self.spec)
        scales, channels, guided = arguments.guidance(cfg_scale, cfg_channels, self.spec, second)
        conditions = self._conditions(labels, prompt_embeds, guided=guided)
        images, shape = len(conditions.labels), self._latent_shape(size, frames)
        return Drawing(
            conditions,
            arguments.noise_keys(seeds, first_image, images),
            arguments.scale_of_each(scales, images),
            channels,
            shape,
            None if latents is None else arguments.checked_latents(latents, (images, *shape)),
            arguments.embedded_guidance(guidance, self.spec),
            second,
            checked_references(reference_latents, images, self.spec),
            arguments.skip_guidance(skip_layer_guidance, self.spec, self.plan, guided=guided),
        )

    async def agenerate(
        self,
        labels: Sequence[int] | None = None,
        *,
        deadline: float | None = None,
        cancel: CancelToken | None = None,
        **arguments: Any,
    ) -> Result:
        """Generate as `generate` does, in a thread, for asyncio.

        If the task is cancelled, the run ends before its next launch. Callbacks run in the thread.

        Args:
            labels: as in `generate`.
            deadline: as in `generate`; the time counts from this call.
            cancel: as in `generate`.
            **arguments: the other arguments of `generate`.

        Raises:
            GocError: as `generate`.
        """

        def run(seconds: float | None, token: CancelToken) -> Result:
            return self.generate(labels, deadline=seconds, cancel=token, **arguments)

        return await in_a_thread(run, deadline, cancel)

    def draw(
        self,
        drawing: Drawing,
        extras: Extras = NO_EXTRAS,
        about: Mapping[str, Any] = NOTHING,
    ) -> Result:
        """Generate the images of arguments that were checked before; see `generate`.

        Args:
            drawing: the images.
            extras: what is wanted besides the images.
            about: more entries of the report.

        Raises:
            GocError: as `generate`, except for errors in arguments.
        """
        self._check_open()
        limits = extras.limits
        if limits is not None:
            limits.check()
        generation = Generation(self.plan, drawing, self.batch_size, self._attached.decoder, extras)

        def run(session: Session) -> None:
            generation.run(session, self.draws)

        weights = self.engines.weights
        with weights.running(limits):
            checkpoint = weights.checkpoint_sha256
            guided = drawing.cfg_scale if drawing.cfg_channels else np.ones(1)
            about_head = self._head_use.checked(guided.tolist())
            self._pool.run(self.new_session, run, extras.spans, limits)
        return generation.result(
            {
                "goc_deploy": __version__,
                **self.backend_description,
                **self.plan_description,
                **about_head,
                "images": len(drawing),
                **size_report(drawing.shape, self.spec, self.manifest.pixels_per_latent),
                **about,
                "cfg_channels": drawing.cfg_channels,
                **({"guidance": drawing.guidance} if self.spec.embedded_guidance else {}),
                "checkpoint_sha256": checkpoint,
            }
        )

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] = ("",),
        *,
        log_prompts: bool = True,
    ) -> PromptEmbeds:
        """Encode prompts; the embeddings of the last prompts are kept.

        Args:
            prompts: the texts.
            negative_prompts: one, or one for each prompt.
            log_prompts: whether the log shows what is left out of a prompt that is too long.

        Raises:
            UsageError: the engine directory has no text encoder, there are no prompts, or the
                number of negative prompts does not fit.
            EnvironmentUnsupportedError: the package tokenizers is missing.
        """
        if not self.manifest.text_encoders:
            raise UsageError(
                "the engine directory has no text encoder; export with `text_encoder`, or give "
                "prompt embeddings"
            )
        if self._attached.text is None:
            raise EnvironmentUnsupportedError(NO_TOKENIZERS)
        with native_calls():
            return self._attached.text.prompt_embeds(
                prompts, negative_prompts, log_prompts=log_prompts
            )

    def with_plan(self, plan: Plan) -> Pipeline:
        """A pipeline of another plan on the same engines.

        The engines must include all graphs that the plan launches: its predict graphs and units, or
        its segments. A plan that computes all units has no predict graphs.
        """
        return Pipeline(
            self.manifest, plan, self.engines, self.backend, self.batch_size, 1, self._attached
        )

    def load_weights(self, engine_dir: str | Path) -> None:
        """Exchange the weights for those of another engine directory, without building engines.

        The other engine directory may come from a fine-tuned checkpoint. Running requests end
        first, and later requests wait. Afterwards, all pipelines on the same engines use the new
        weights, and ``checkpoint_sha256`` in the reports of results identifies them. Plans do not
        change, although they may have been calibrated with other weights. The VAE decoder, the text
        encoder and the stored captions do not change either.

        TensorRT engines with shared weights get new values at the same addresses, and recorded
        steps remain valid. ONNX Runtime loads the graphs again, one after the other, and drops each
        old one first, so that memory never has both versions of a graph.

        If an error is raised, the weights are the previous ones.

        Args:
            engine_dir: an export of the same architecture, sizes and precision by the same version
                of the exporter.

        Raises:
            UsageError: the model, precision or graphs differ, which the message lists, or the
                caller is a callback.
            EngineDirError, SafetyError: a file is missing, corrupt or not from this package.
            EnvironmentUnsupportedError: TensorRT engines embed their weights, or the pipeline was
                closed.
            ResourceError: there is not enough memory.
        """
        from goc_deploy.runtime.exchange import load_weights

        self._check_open()
        load_weights(Path(engine_dir), self.engines, self.backend)

    def warmup(self, images: Sequence[int] = (1,), *, guided: Sequence[bool] | None = None) -> None:
        """Run every session until later requests of these shapes compile and record nothing.

        The method waits for each session, one after the other.

        Args:
            images: numbers of images of the requests, each within the batch size; ``(1,
                batch_size)`` also prepares full batches.
            guided: whether the requests are guided; None is as requests of the default
                ``cfg_scale`` are.

        Raises:
            UsageError: a number of images is not within 1..batch_size.
            EnvironmentUnsupportedError: the pipeline was closed, or was loaded before a fork.
        """
        self._check_open()
        for size in images:
            if not arguments.is_whole(size) or not 1 <= size <= self.batch_size:
                raise UsageError(
                    f"images to warm up with must be within 1..{self.batch_size}, got {size!r}"
                )
        if guided is None:
            guided = (not self.spec.embedded_guidance,)
        requests = [
            self._request_to_warm_up(size, guided=is_guided)
            for size, is_guided in product(images, guided)
        ]

        def run_each(session: Session) -> None:
            for request, _ in product(requests, range(self.runs_to_warm)):
                session.run(request)

        with self.engines.weights.running():
            self._pool.run_on_each(self.new_session, run_each)
        if self._attached.decoder is not None:
            for size in images:
                self._attached.decoder.images(np.zeros((size, *self.spec.latents), np.float32))

    @property
    def runs_to_warm(self) -> int:
        """Requests of a shape that warm a session up: a GPU records a step after its first run."""
        return 1 if self.on_cpu else 2

    @property
    def on_cpu(self) -> bool:
        """Whether the engines run on the CPU, where checks of limits cost nothing."""
        return self.backend.device.kind == "cpu"

    def _request_to_warm_up(self, images: int, *, guided: bool) -> Request:
        captions = blank_captions(self.spec) if self.spec.text_conditional else None
        labels = [0] * images if captions else [i % self.spec.choices for i in range(images)]
        conditions = self._conditions(labels, captions, guided=guided)
        noise = np.zeros((images, self.draws, *self.spec.latents), np.float32)
        scales = np.full(images, CFG_SCALE if guided else 1.0)
        references = blank_references(images, self.spec)
        channels = self.spec.guided_channels
        return Request(conditions, noise, scales, channels, references=references)

    @property
    def backend_description(self) -> dict[str, Any]:
        """Name, version and device of the backend, in JSON types, as reports of results have it."""
        return self.backend.describe()

    @property
    def plan_description(self) -> dict[str, Any]:
        """Sizes of the plan for full batches, in JSON types, as reports of results have them."""
        return plan_report(self.plan, self.spec, self.manifest.precision, self.batch_size)

    @property
    def closed(self) -> bool:
        """Whether `close` was called; every request raises an error afterwards."""
        return self._pool.closed

    def close(self) -> None:
        """Free the engines and buffers.

        Running calls end normally; later and waiting calls raise an error. Closing twice is
        allowed.
        """
        self._pool.close()
        self.engines = Engines({}, {})

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loaded pipeline cannot be pickled; load the engine directory in the other process"
        )

    @property
    def draws(self) -> int:
        """Number of noise tensors of an image: x_T, and one per step of a stochastic sampler."""
        return 1 + (self.plan.steps if self.plan.sampler.stochastic else 0)

    def _latent_shape(self, size: tuple[int, int] | None, frames: int | None) -> tuple[int, ...]:
        """The shape of the latents of an image of a size."""
        if size is None and frames is None:
            return self.spec.latents
        shape = latent_shape(size, frames, self.spec, self.manifest.pixels_per_latent)
        if shape != self.spec.latents and self.plan.sampler.head is not None:
            raise UsageError(
                f"plan {self.plan.name} has a head, which corrects samples of the usual size only; "
                "use a plan without a head, or leave out `size` and `frames`"
            )
        return shape

    def _conditions(
        self, labels: Sequence[int] | None, prompt_embeds: PromptEmbeds | None, *, guided: bool
    ) -> Conditions:
        stored = self.engines.captions
        return arguments.conditions(labels, prompt_embeds, self.spec, stored, guided=guided)

    def _check_open(self) -> None:
        if self._pool.closed:
            raise EnvironmentUnsupportedError(CLOSED)
        if os.getpid() != self._pid:
            raise EnvironmentUnsupportedError(
                "the pipeline was loaded before a fork, which its threads do not survive; load "
                "after forking"
            )

    def new_session(self) -> Session:
        """Make a session with buffers of its own, for a caller that runs the launches itself."""
        session = Session(
            self.engines,
            self.backend,
            self.spec,
            self.manifest.precision,
            self.plan,
            self.batch_size,
        )
        captions = 2 if self.spec.text_conditional else 0
        labels = 1 if self.spec.one_modulation else 2
        session.bind(Batch(1, True, labels, captions))
        self.engines.weights.sessions.add(session)
        return session
