"""What a service is asked for, and the bounds of what it accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from goc_deploy.cancellation import CancelToken
from goc_deploy.errors import UsageError
from goc_deploy.options import GenerateOptions
from goc_deploy.runtime.step_events import StepHook

DEFAULTS = GenerateOptions()


@dataclass(frozen=True, slots=True)
class HostedModel:
    """An engine directory that a service loads.

    Attributes:
        engine_dir: the directory.
        plans: names or SPECs of its plans; empty takes all plans of the directory.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        batch_size: largest number of images of a run; None takes that of the engine directory.
        threads: size of the thread pool; 0 is one thread per core.
        cuda_graphs: as `goc_deploy.load` takes it.
        warmup_images: numbers of images of the runs that warm a plan up.
    """

    engine_dir: str | Path
    plans: Sequence[str] = ()
    backend: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    threads: int = 0
    cuda_graphs: bool = True
    warmup_images: Sequence[int] = (1,)


@dataclass(frozen=True, slots=True, eq=False)
class ImageRequest:
    """A request for one or more images.

    Attributes:
        model: name of the model in the service.
        plan: name or SPEC of the plan; None takes the first plan that caches.
        labels: as `goc_deploy.runtime.pipeline.Pipeline.generate` takes them.
        prompts: texts, if the model has a text encoder.
        negative_prompts: one for all images, or one for each prompt.
        seed: one seed for the request, or one per image.
        cfg_scale: one guidance scale, or one per image; None takes the default of the model.
        cfg_channels: number of channels that are guided; None takes that of the model.
        guidance: guidance scale that a distilled model embeds; None takes 3.5.
        cfg_scale_2: guidance scale of the second set of weights; None takes ``cfg_scale``.
        deadline: seconds from the submission, with the time in the queue; None is no limit.
        cancel: token that cancels the request.
        callback: called after every step with a `StepEvent` of the images of this request, in a
            thread of the service.
        request_id: name in logs and reports; None makes one.
    """

    model: str
    plan: str | None = None
    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    negative_prompts: Sequence[str] = ("",)
    seed: int | Sequence[int] = DEFAULTS.seed
    cfg_scale: float | Sequence[float] | None = DEFAULTS.cfg_scale
    cfg_channels: int | None = DEFAULTS.cfg_channels
    guidance: float | None = DEFAULTS.guidance
    cfg_scale_2: float | None = DEFAULTS.cfg_scale_2
    deadline: float | None = None
    cancel: CancelToken | None = None
    callback: StepHook | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds of a service.

    Attributes:
        queued_images: images of all requests that wait.
        images_per_request: images of one request.
        prompt_characters: characters of one prompt, or of one negative prompt.
        batch_images: images of the requests that run together, at most the batch size of the
            engines; None takes that batch size, and 1 turns batching off.
        max_delay_seconds: how long a request waits for others that it could run together with.
        workers: batches that run at the same time.
    """

    queued_images: int = 256
    images_per_request: int = 16
    prompt_characters: int = 2000
    batch_images: int | None = None
    max_delay_seconds: float = 0.01
    workers: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            fits = field.name == "max_delay_seconds" or isinstance(value, int)
            smallest = 0 if field.name == "max_delay_seconds" else 1
            if value is None and field.name == "batch_images":
                continue
            if not fits or isinstance(value, bool) or not value >= smallest:
                argument = "`" + field.name + "`"  # flags.py turns it into the flag
                raise UsageError(
                    f"{argument} must be a number and at least {smallest}, got {value!r:.60}"
                )
        if self.queued_images < self.images_per_request:
            raise UsageError(
                f"`queued_images` is {self.queued_images}, too few for a request of "
                f"{self.images_per_request} images, see `images_per_request`"
            )


def check_images(images: int, limits: ServiceLimits) -> None:
    """Check the number of images of a request.

    Raises:
        UsageError: the service takes fewer, or there are none.
    """
    if not 1 <= images <= limits.images_per_request:
        raise UsageError(
            f"a request of this service has 1..{limits.images_per_request} images, got {images}"
        )


def check_texts(request: ImageRequest, limits: ServiceLimits) -> None:
    """Check the type and the length of prompts.

    Raises:
        UsageError: they are not lists of texts, or one is too long.
    """
    for name, texts in (
        ("prompts", request.prompts or ()),
        ("negatives", request.negative_prompts),
    ):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{name} of a request must be a list of texts")
        longest = max(map(len, texts), default=0)
        if longest > limits.prompt_characters:
            raise UsageError(
                f"{name} of a request have up to {longest} characters, but this service takes "
                f"{limits.prompt_characters}; shorten them"
            )
