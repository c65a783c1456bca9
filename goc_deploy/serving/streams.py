"""Images as server-sent events: the steps of a request, previews, and the image at the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fastapi.responses import Response, StreamingResponse

from goc_deploy.errors import UsageError
from goc_deploy.runtime.results import Result
from goc_deploy.runtime.step_events import StepEvent, StepHook
from goc_deploy.serving.api_schema import (
    GenerationBody,
    about_image,
    base64_png,
    response_of_error,
)
from goc_deploy.serving.requests import ImageRequest
from goc_deploy.serving.service import Service

Answer = Callable[[Result, ImageRequest], dict[str, Any]]
Put = Callable[[str, dict[str, Any]], object]

# Fields that OpenAI's clients expect in events, and that mean nothing here.
QUALITY = {"quality": "auto"}
NO_TOKENS = {
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0),
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def streamed(
    service: Service, request: ImageRequest, body: GenerationBody, answer: Answer
) -> Response:
    """Submit a request, and answer with its steps, its previews and its image.

    Args:
        service: runs the request.
        request: the request, of one image.
        body: which events are wanted.
        answer: makes the body of the result, whose only image becomes part of the last event.

    Raises:
        GocError: the request is refused.
    """
    if body.n != 1:
        raise UsageError("a stream has one image; use n=1")
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def put(kind: str, fields: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, _event(kind, fields))

    callback = _step_hook(body, put) if body.partial_images or body.step_events else None
    future = service.submit(replace(request, callback=callback))

    def ended(_: object) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, None)

    future.add_done_callback(ended)
    events = _events(queue, future, request, answer)
    return StreamingResponse(events, media_type="text/event-stream")


def _step_hook(body: GenerationBody, put: Put) -> StepHook:
    """The callback that puts the events of a step."""

    def on_step(event: StepEvent) -> None:
        partial = _places(body.partial_images, event.steps)
        shown = _places(body.step_previews, event.steps)
        picture = None
        images = event.preview() if event.step in {*partial, *shown} else None
        if images is not None:
            picture = {"b64_json": base64_png(images[0])}
            if event.step in partial:
                about = {"partial_image_index": partial.index(event.step), **about_image(images[0])}
                put("image_generation.partial_image", {**picture, **about, **QUALITY})
        if body.step_events:
            fields = {"step": event.step, "steps": event.steps, "kind": event.kind}
            seen = picture if picture is not None and event.step in shown else {}
            put("goc.step", {**fields, **seen})

    return on_step


def _places(previews: int, steps: int) -> list[int]:
    """The steps of previews: spread evenly, without the last step, whose image is the result."""
    places = {round((i + 1) * steps / (previews + 1)) - 1 for i in range(previews)}
    return sorted(place for place in places if 0 <= place < steps - 1)


async def _events(
    queue: asyncio.Queue[str | None], future: Future[Result], request: ImageRequest, answer: Answer
) -> AsyncIterator[str]:
    """The events of a stream; if the client is gone, the request is cancelled."""
    try:
        while (event := await queue.get()) is not None:
            yield event
        try:
            body = await asyncio.to_thread(answer, future.result(), request)
        except Exception as error:
            yield _event("error", response_of_error(error)[1])
            return
        picture = body.pop("data")[0]
        ended = {**picture, **body, **QUALITY, "usage": NO_TOKENS}
        yield _event("image_generation.completed", ended)
    finally:
        future.cancel()


def _event(kind: str, fields: dict[str, Any]) -> str:
    body = {"type": kind, "created_at": int(time.time()), **fields}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n"
