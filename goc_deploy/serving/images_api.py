"""The OpenAI Images API over a `Service`, as an ASGI application (FastAPI)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from goc_deploy.conditions.labels import labels_from_text
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import CancelledError, NotReadyError, UsageError, VerificationError
from goc_deploy.runtime.arguments import checked_scale
from goc_deploy.runtime.results import Result
from goc_deploy.serving.api_schema import (
    GenerationBody,
    ModelNotFoundError,
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

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2**16
DISCONNECT_SECONDS = 0.1  # between two looks at the connection
OPEN = ("/", "/health/live", "/health/ready")  # paths that need no token

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
    app = FastAPI(title="goc_deploy", docs_url=None, redoc_url=None)

    app.add_middleware(Admission, token=token)
    html, page_headers = page()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        body = error_body(
            f"{where or 'body'}: {first['msg']}", "invalid_request_error", "invalid_value", where
        )
        return JSONResponse(body, 400)

    @app.post("/v1/images/generations", response_model=None)
    async def generations(body: GenerationBody, request: Request) -> Response:
        try:
            wanted = request_of_body(service, body)
            if body.stream:
                return streamed(service, wanted, body, _answer)
            result = await _while_connected(request, service.agenerate(wanted))
            return JSONResponse(await asyncio.to_thread(_answer, result, wanted))
        except Exception as error:
            return _failure(error)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @app.get("/v1/plans", response_model=None)
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

        @app.get("/metrics")
        async def metrics_page() -> Response:
            return Response(metrics.text(), media_type="text/plain; version=0.0.4")

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
    return {
        "created": int(time.time()),
        "data": [{"b64_json": picture} for picture in _pictures(result)],
        "model": request.model,
        "plan": result.report["plan"],
        "seed": request.seed,
        "seconds": result.report["total_ms"] / 1e3,
        "batch_images": result.report["batch_images"],
    }


def _pictures(result: Result) -> list[str]:
    if result.errors:
        raise next(iter(result.errors.values()))
    if result.images is None:
        raise VerificationError("the model made no images")
    return [base64_png(image) for image in result.images]


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
