"""The HTTP server: a service behind uvicorn, which drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from goc_deploy.errors import EnvironmentUnsupportedError, NotReadyError
from goc_deploy.options import ServeOptions
from goc_deploy.serving.api_schema import response_of_error
from goc_deploy.serving.hosted import hosted_models
from goc_deploy.serving.images_api import application
from goc_deploy.serving.prometheus import PrometheusMetrics
from goc_deploy.serving.requests import ServiceLimits
from goc_deploy.serving.service import Service

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "GOC_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
STOPPING = (signal.SIGTERM, signal.SIGINT)
LISTEN_POLL_SECONDS = 0.01
ANSWER_SECONDS = 5  # that clients have after the drain to finish sending or reading


class Server(uvicorn.Server):
    """A server whose signals are handled by `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class Answered:
    """Answers the requests that are cut off when the server stops, which uvicorn cancels.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not began:
                status, body, headers = response_of_error(NotReadyError("the server has stopped"))
                await JSONResponse(body, status, headers)(scope, receive, send)


def serve(options: ServeOptions) -> None:
    """Serve engine directories until SIGTERM or Ctrl-C, and end the accepted requests first.

    Raises:
        GocError: an engine directory cannot be loaded.
        EnvironmentUnsupportedError: the address cannot be used.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and options.host not in LOOPBACK:
        logger.warning(
            "anyone who reaches %s can use this server; set %s to require a bearer token",
            options.host,
            TOKEN_VARIABLE,
        )
    metrics = PrometheusMetrics()
    service = Service(hosted_models(options), limits=service_limits(options), metrics=metrics)
    app = application(service, metrics, token)
    config = uvicorn.Config(
        Answered(app),
        options.host,
        options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )
    try:
        asyncio.run(_serve(Server(config), service, options.drain_seconds))
    finally:
        service.close()


async def _serve(server: Server, service: Service, drain_seconds: float) -> None:
    """Answer at once, load meanwhile, and drain when a signal arrives.

    Raises:
        EnvironmentUnsupportedError: the address cannot be used.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, stop.set)
    answering = asyncio.create_task(_answering(server))
    while not (server.started or answering.done()):
        await asyncio.sleep(LISTEN_POLL_SECONDS)
    if not server.started:
        raise EnvironmentUnsupportedError(
            f"{server.config.host}:{server.config.port} cannot be used; choose another `port`"
        )
    loading = asyncio.create_task(asyncio.to_thread(service.start))
    stopping = asyncio.create_task(stop.wait())
    waiting: set[asyncio.Task[object]] = {answering, loading, stopping}
    while not stopping.done() and not answering.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if loading in done and loading.exception() is not None:
            break
    if loading.done() and loading.exception() is None:
        await asyncio.to_thread(service.drain, drain_seconds)
    server.should_exit = True
    stopping.cancel()
    await answering
    if loading.done():
        loading.result()


async def _answering(server: Server) -> None:
    # uvicorn exits if it cannot listen. Out of a task, that would end the loop with everything.
    with contextlib.suppress(SystemExit):
        await server.serve()


def service_limits(options: ServeOptions) -> ServiceLimits:
    """The bounds of the service of a server."""
    return ServiceLimits(
        queued_images=options.queued_images,
        images_per_request=options.images_per_request,
        batch_images=options.batch_images,
        max_delay_seconds=options.max_delay_ms / 1e3,
        workers=options.workers,
    )
