"""The HTTP server on Ray Serve: replicas of one service, each in a process with its own device.

serve run goc_deploy.serving.ray_serve:application engine_dirs=/models/engine num_gpus=1
"""

# Without `from __future__ import annotations`, because Ray Serve reads the class of the options
# from the signature of `application`.
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.options import ServeOptions
from goc_deploy.serving.hosted import hosted_models
from goc_deploy.serving.images_api import application as images_application
from goc_deploy.serving.server import TOKEN_VARIABLE, service_limits
from goc_deploy.serving.service import Service

DEFAULTS = ServeOptions()
SEPARATOR = ";"  # SPECs of plans have commas and colons
RETRY_AFTER_SECONDS = 1.0


class ReplicaOptions(BaseModel):
    """Options of the application, as ``serve run`` and configuration files pass them.

    Attributes:
        engine_dirs: absolute paths of the engine directories, the same on all machines; a text
            may have several, separated by ``;``.
        plans: names or SPECs of the plans to load from each, as a list or a text with ``;``;
            empty takes all.
        backend: as `goc_deploy.load` takes it.
        threads: size of the thread pool of a replica; None takes ``num_cpus``.
        batch_images: largest number of images that run together; None takes that of the engines.
        max_delay_ms: how long a request waits for others to run with.
        queued_images: images that may wait in a replica; it answers further requests with 429.
        images_per_request: largest number of images of a request.
        drain_seconds: how long accepted requests may take when a replica stops.
        num_gpus: GPUs of a replica: 0, 1, or a fraction of one that replicas share.
        num_cpus: CPUs of a replica.
        num_replicas: number of replicas; None is one, or what ``autoscaling`` decides.
        autoscaling: fields of ``ray.serve.config.AutoscalingConfig``, or None.
        max_ongoing_requests: requests that a replica accepts at a time; others wait in a proxy.
        max_queued_requests: requests that wait in a proxy; it answers further ones with 503.
        health_check_seconds: time between two health checks of a replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_dirs: tuple[Path, ...] = Field(min_length=1)
    plans: tuple[str, ...] = ()
    backend: str = DEFAULTS.backend
    threads: int | None = Field(default=None, ge=0)
    batch_images: int | None = DEFAULTS.batch_images
    max_delay_ms: float = DEFAULTS.max_delay_ms
    queued_images: int = DEFAULTS.queued_images
    images_per_request: int = DEFAULTS.images_per_request
    drain_seconds: float = Field(default=DEFAULTS.drain_seconds, ge=0)
    num_gpus: float = Field(default=0, ge=0, le=1)
    num_cpus: int = Field(default=1, ge=1)
    num_replicas: int | None = Field(default=None, ge=1)
    autoscaling: dict[str, Any] | None = None
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)
    health_check_seconds: float = Field(default=10.0, gt=0)

    @field_validator("engine_dirs", "plans", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return value.split(SEPARATOR) if isinstance(value, str) else value

    @field_validator("engine_dirs")
    @classmethod
    def _absolute(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            if not path.is_absolute():
                raise ValueError(
                    f"{path} is relative, but replicas run elsewhere; make it absolute"
                )
        return paths

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("autoscaling decides the number of replicas; leave out num_replicas")
        return self

    def serve_options(self) -> ServeOptions:
        """The options of the service in a replica."""
        names = {field.name for field in fields(ServeOptions)}
        given = self.model_dump(include=names, exclude={"threads"})
        return ServeOptions(
            **given,
            device="cuda" if self.num_gpus else "cpu",
            threads=self.num_cpus if self.threads is None else self.threads,
        )


class Replica:
    """A service in a process of its own; Ray Serve makes one per replica.

    Args:
        options: what to load.
        with_token: whether the process that deploys has a token; the replica must have one too.

    Raises:
        EnvironmentUnsupportedError: the token is missing here.
        GocError: an engine directory cannot be loaded.
    """

    def __init__(self, options: ServeOptions, with_token: bool) -> None:
        self._service = Service(hosted_models(options), limits=service_limits(options))
        self._token = os.environ.get(TOKEN_VARIABLE) or None
        if with_token and self._token is None:
            raise EnvironmentUnsupportedError(
                f"{TOKEN_VARIABLE} is set where the application is deployed, but not in the "
                "processes of Ray on this machine; set it before `ray start`"
            )
        self._service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return images_application(self._service, token=self._token)

    def check_health(self) -> None:
        """Report to Ray Serve, which replaces a replica that is not ready.

        Raises:
            NotReadyError: the service is not ready.
        """
        self._service.check_ready()

    def __del__(self) -> None:
        # Ray Serve waits for the accepted requests before.
        self._service.close()


def application(options: ReplicaOptions) -> serve.Application:
    """Build the application for ``serve run``, configuration files and ``ray.serve.run``.

    Too many requests are answered with a header ``Retry-After``: with 429 by a replica whose queue
    is full, with 503 by a proxy with which too many requests wait for a replica.

    Args:
        options: what to load, and the replicas.
    """
    scale: dict[str, Any] = {"num_replicas": options.num_replicas or 1}
    if options.autoscaling is not None:
        scale = {"autoscaling_config": options.autoscaling}
    deployment = serve.deployment(
        name="goc",
        ray_actor_options={"num_gpus": options.num_gpus, "num_cpus": options.num_cpus},
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_SECONDS},
        graceful_shutdown_timeout_s=options.drain_seconds,
        health_check_period_s=options.health_check_seconds,
        **scale,
    )
    replicas = deployment(serve.ingress()(Replica))
    return replicas.bind(options.serve_options(), bool(os.environ.get(TOKEN_VARIABLE)))
