"""The OpenAI Images API over a `Service`, as an ASGI application (FastAPI)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
import uuid
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from goc_deploy.conditions.labels import labels_from_text
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import CancelledError, NotReadyError, UsageError, VerificationError
from goc_deploy.runtime.arguments import checked_scale
from goc_deploy.runtime.results import Result
from goc_deploy.serving.api_schema import (
    ErrorAnswer,
    GenerationBody,
    ImagesAnswer,
    ModelNotFoundError,
    about_image,
    base64_png,
    error_body,
    response_of_error,
)
from goc_deploy.serving.page import page
from goc_deploy.serving.plan_cards import model_cards
from goc_deploy.serving.prometheus import PrometheusMetrics
from goc_deploy.serving.requests import ImageRequest, check_images
from goc_deploy.serving.service import Service
from goc_deploy.serving.streams import streamed
from goc_deploy.version import __version__

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2**16
DISCONNECT_SECONDS = 0.1  # between two looks at the connection
OPEN = ("/", "/health/live", "/health/ready")  # paths that need no token
STREAM = {"schema": {"type": "string", "description": "server-sent events, if stream is true"}}
GENERATED: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesAnswer, "content": {"text/event-stream": STREAM}}
}

Returned = TypeVar("Returned")


class Admission:
    """Refuses requests without the token, or with a body that is too large.

    It is no `BaseHTTPMiddleware`, which hides from the application that a client is gone.

    Args:
        app: the application.
        token: bearer token that requests need, or None.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        refused = None
        if scope["type"] == "http":
            refused = _refusal(Request(scope), self._token)
        await (self._app if refused is None else refused)(scope, receive, send)


def application(
    service: Service, metrics: PrometheusMetrics | None = None, token: str | None = None
) -> FastAPI:
    """Make the application.

    Args:
        service: a service, which may still be loading.
        metrics: the metrics of the service for ``/metrics``, or None.
        token: bearer token that requests need, or None.
    """
    app = _application_without_paths(token)
    secured = [] if token is None else [Depends(HTTPBearer(auto_error=False))]  # for OpenAPI
    html, page_headers = page()

    @app.post("/v1/images/generations", dependencies=secured, responses=GENERATED)
    async def generations(body: GenerationBody, request: Request) -> Response:
        request_id = uuid.uuid4().hex
        try:
            wanted = replace(request_of_body(service, body), request_id=request_id)
            if body.stream:
                answer = streamed(service, wanted, body, _answer)
            else:
                result = await _while_connected(request, service.agenerate(wanted))
                answer = JSONResponse(await asyncio.to_thread(_answer, result, wanted))
        except Exception as error:
            answer = _failure(error)
        answer.headers["X-Request-Id"] = request_id  # that of the log
        return answer

    @app.get("/v1/models", dependencies=secured)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @app.get("/v1/plans", dependencies=secured)
    async def plans() -> Response:
        try:
            service.check_ready()
        except NotReadyError as error:
            return _failure(error)
        return JSONResponse({"object": "list", "data": model_cards(service)})

    @app.get("/", include_in_schema=False)
    async def start_page() -> Response:
        return HTMLResponse(html, headers=page_headers)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> Response:
        return JSONResponse(service.health().as_dict(), 200 if service.ready() else 503)

    if metrics is not None:

        @app.get("/metrics", dependencies=secured)
        async def metrics_page() -> Response:
            return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _application_without_paths(token: str | None) -> FastAPI:
    """An application that admits requests and answers with errors in OpenAI's form."""
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer}}
    app = FastAPI(
        title="goc_deploy", version=__version__, docs_url=None, redoc_url=None, responses=errors
    )
    app.add_middleware(Admission, token=token)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def request_of_body(service: Service, body: GenerationBody) -> ImageRequest:
    """Convert the body of a request.

    Raises:
        UsageError: the model, the class or the size does not exist, or the scale is out of range.
    """
    names = list(service.models)
    name = str(names[0] if body.model is None and len(names) == 1 else body.model)
    if service.ready() and name not in service.models:
        raise ModelNotFoundError(f"there is no model {name!r:.60}; there are {', '.join(names)}")
    request = ImageRequest(
        name,
        body.plan,
        seed=secrets.randbits(32) if body.seed is None else body.seed,
        cfg_scale=None
        if body.guidance_scale is None
        else checked_scale(body.guidance_scale, "guidance_scale"),
        deadline=body.deadline,
    )
    if name not in service.models:
        return request  # The service is not ready, and refuses it.
    manifest = service.models[name].directory.manifest
    size = _size(manifest)
    if size is None:
        raise UsageError(f"model {name} has no decoder, so it makes no images")
    if manifest.model.video:
        raise UsageError(f"model {name} makes videos, and this API only images")
    if body.size not in (None, "auto", size):
        raise UsageError(f"size {body.size!r:.20} does not exist; model {name} has {size}")
    check_images(body.n, service.limits)  # before there are lists of that length
    if manifest.text_encoders:
        negatives = [body.negative_prompt]
        return replace(request, prompts=[body.prompt] * body.n, negative_prompts=negatives)
    if body.negative_prompt:
        raise UsageError(f"model {name} has no text encoder, so it takes no negative_prompt")
    labels = labels_from_text(body.prompt, manifest.class_names)
    if len(labels) != 1:
        raise UsageError("the prompt of a class-conditional model is one class, by name or number")
    return replace(request, labels=labels * body.n)


def _refusal(request: Request, token: str | None) -> Response | None:
    """The answer to a request without the token, or with a body that is too large."""
    if token is not None and request.url.path not in OPEN:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            body = error_body(
                "the bearer token is wrong or missing", "authentication_error", "invalid_api_key"
            )
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
    if request.method not in ("POST", "PUT", "PATCH"):
        return None
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        body = error_body("send a Content-Length", "invalid_request_error", "length_required")
        return JSONResponse(body, 411)
    if int(length) > MAX_BODY_BYTES:
        text = f"the body has more than {MAX_BODY_BYTES} bytes"
        return JSONResponse(error_body(text, "invalid_request_error", "too_large"), 413)
    return None


async def _wrong_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    text = f"{where or 'body'}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        text = f"there is no field {where!r:.60}; see /openapi.json"
    return JSONResponse(error_body(text, "invalid_request_error", "invalid_value", where), 400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text, code = str(error.detail), "invalid_value"
    if error.status_code in (404, 405):
        text = f"there is no {request.method} {request.url.path:.60}; see /openapi.json"
        code = "unknown_url"
    body = error_body(text, "invalid_request_error", code)
    return JSONResponse(body, error.status_code, error.headers)


def _failure(error: Exception) -> Response:
    status, body, headers = response_of_error(error)
    if body["error"]["code"] == "bug":
        logger.error("a request failed", exc_info=error)
    return JSONResponse(body, status, headers)


async def _while_connected(request: Request, waiting: Coroutine[Any, Any, Returned]) -> Returned:
    """Await a result, and cancel it if the client closes the connection.

    Raises:
        CancelledError: the client is gone.
    """
    task = asyncio.ensure_future(waiting)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=DISCONNECT_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise CancelledError("the client closed the connection")
        return task.result()
    finally:
        task.cancel()


def _answer(result: Result, request: ImageRequest) -> dict[str, Any]:
    """The body of a result.

    Raises:
        VerificationError: an image is not finite.
    """
    images = _images(result)
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64_png(image)} for image in images],
        **about_image(images[0]),
        "model": request.model,
        "plan": result.report["plan"],
        "seed": request.seed,
        "seconds": result.report["total_ms"] / 1e3,
        "batch_images": result.report["batch_images"],
    }


def _images(result: Result) -> np.ndarray:
    if result.errors:
        raise next(iter(result.errors.values()))
    if result.images is None:
        raise VerificationError("the model made no images")
    return result.images


def _size(manifest: Manifest) -> str | None:
    """Width and height of the images, as in ``1024x768``, or None without images."""
    if manifest.image_size is None:
        return None
    height, width = manifest.image_size
    return f"{width}x{height}"


def _model(service: Service, name: str) -> dict[str, Any]:
    loaded = service.models[name]
    manifest = loaded.directory.manifest
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "goc_deploy",
        "plans": list(loaded.plans),
        "size": _size(manifest),
        "takes": loaded.takes,
    }
