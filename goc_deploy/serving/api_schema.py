"""Bodies of the OpenAI Images API, as far as this server has it, and its errors."""

from __future__ import annotations

import base64
import io
import math
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from goc_deploy.errors import (
    CancelledError,
    DeadlineError,
    GocError,
    NotReadyError,
    OverloadedError,
    UsageError,
)
from goc_deploy.runtime.images import picture

CLIENT_CLOSED = 499  # as nginx has it: the client is gone, and nobody reads the answer
MAX_STEP_PREVIEWS = 50


class GenerationBody(BaseModel):
    """The body of ``POST /v1/images/generations``. Unknown fields are refused.

    The fields that OpenAI documents and that decide nothing here, from ``background`` on, are
    accepted with the values that describe what this server does.

    Attributes:
        prompt: text, or the name or the number of a class.
        model: name of an engine directory; may be left out if there is one.
        n: number of images.
        size: ``WIDTHxHEIGHT`` of the model, or ``auto``.
        response_format: images are always base64.
        output_format: images are always PNG.
        stream: whether to answer with server-sent events.
        partial_images: number of previews in a stream.
        step_events: whether a stream has an event after every step; our own field.
        step_previews: number of these events that have a preview, spread evenly; our own field.
        plan: name or SPEC of a plan; our own field.
        seed: seed of the noise; None takes a random one. Our own field.
        guidance_scale: classifier-free guidance scale; None takes 4, or 1 for a model with embedded
            guidance. Our own field.
        negative_prompt: what the images should differ from; our own field.
        deadline: seconds that the request may take; our own field.
        background: images have no transparency.
        moderation: ignored.
        output_compression: PNGs are compressed without loss.
        quality: ignored; a plan decides it.
        style: ignored.
        user: ignored.
        safety_identifier: ignored.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    step_events: bool = False
    step_previews: int = Field(default=0, ge=0, le=MAX_STEP_PREVIEWS)
    plan: str | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    deadline: float | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None
    output_compression: Literal[100] | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None
    safety_identifier: str | None = None


class ImageItem(BaseModel):
    """One image."""

    b64_json: str


class ImagesAnswer(BaseModel):
    """The body of an answer with images.

    Attributes:
        created: seconds since 1970.
        data: the images.
        background: images have no transparency.
        output_format: images are PNGs.
        size: ``WIDTHxHEIGHT``.
        model: name of the engine directory.
        plan: name of the plan.
        seed: seed of the noise.
        seconds: time of the sampling steps.
        batch_images: number of images that ran together in that time.
    """

    created: int
    data: list[ImageItem]
    background: str
    output_format: str
    size: str
    model: str
    plan: str
    seed: int
    seconds: float
    batch_images: int


class ErrorDetails(BaseModel):
    """What is wrong, as clients of OpenAI read it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetails


class ModelNotFoundError(UsageError):
    """The server has no model of that name."""


def base64_png(image: np.ndarray) -> str:
    """Encode an image (H, W, channels) uint8."""
    file = io.BytesIO()
    picture(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def about_image(image: np.ndarray) -> dict[str, str]:
    """What OpenAI's answers have beside an image (H, W, channels)."""
    size = f"{image.shape[1]}x{image.shape[0]}"
    return {"background": "opaque", "output_format": "png", "size": size}


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error, in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_of_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error of a request."""
    message = str(error)
    if isinstance(error, ModelNotFoundError):
        return 404, error_body(message, "invalid_request_error", "model_not_found", "model"), {}
    if isinstance(error, UsageError):
        return 400, error_body(message, "invalid_request_error", "invalid_value"), {}
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
        return 429, error_body(message, "rate_limit_error", "overloaded"), headers
    if isinstance(error, NotReadyError):
        return 503, error_body(message, "server_error", "not_ready"), {"Retry-After": "1"}
    if isinstance(error, DeadlineError):
        return 504, error_body(message, "server_error", "deadline"), {}
    if isinstance(error, CancelledError):
        return CLIENT_CLOSED, error_body(message, "server_error", "cancelled"), {}
    if isinstance(error, GocError):
        return 500, error_body(message, "server_error", type(error).__name__), {}
    text = "the server has a bug; its log has the traceback"
    return 500, error_body(text, "server_error", "bug"), {}
