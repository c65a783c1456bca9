"""goc-serve."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from goc_deploy.cli.app import run_command
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    backend_option,
    common_options,
    device_option,
    threads_option,
)
from goc_deploy.options import ServeOptions

DEFAULTS = ServeOptions()
HTTP_ONLY = ("host", "port", "images_per_request", "drain_seconds")


@click.command(
    "goc-serve",
    context_settings=SETTINGS,
    epilog="Example: goc-serve engine --port 8000",
)
@click.argument("engine_dirs", nargs=-1, required=True, type=PATH)
@click.option(
    "--plan", "plans", multiple=True, help="Plan to load, repeatable.  [default: all plans]"
)
@click.option("--host", default=DEFAULTS.host, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=DEFAULTS.port, help="Port to listen on."
)
@click.option(
    "--batch-images",
    type=click.IntRange(1),
    help="Largest number of images that run together; 1 turns batching off.  "
    "[default: that of the engine directory]",
)
@click.option(
    "--max-delay-ms",
    type=click.FloatRange(0),
    default=DEFAULTS.max_delay_ms,
    help="Milliseconds that a request waits for others to run with.",
)
@click.option(
    "--queued-images",
    type=click.IntRange(1),
    default=DEFAULTS.queued_images,
    help="Number of images that may wait; more requests are refused with 429.",
)
@click.option(
    "--images-per-request",
    type=click.IntRange(1),
    default=DEFAULTS.images_per_request,
    help="Largest number of images of a request.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=DEFAULTS.workers,
    help="Number of batches that run at the same time.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0),
    default=DEFAULTS.drain_seconds,
    help="Seconds that accepted requests have to end after SIGTERM.",
)
@click.option(
    "--triton-repository",
    type=PATH,
    metavar="DIR",
    help="Serve nothing; write a model for Triton Inference Server per engine directory into this "
    "folder.",
)
@backend_option
@device_option
@threads_option
@common_options
def command(engine_dirs: tuple[Path, ...], triton_repository: Path | None, **options: Any) -> None:
    """Serve engine directories with the OpenAI Images API.

    The name of a directory is the name of its model. If the environment has GOC_SERVE_TOKEN,
    requests need it as a bearer token.
    """
    if triton_repository is not None:
        _write_repository(triton_repository, ServeOptions(engine_dirs, **options))
        return
    from goc_deploy.api.requirements import require

    require("serve", "fastapi", "uvicorn", "prometheus_client")
    from goc_deploy.serving.server import serve

    serve(ServeOptions(engine_dirs, **options))


def _write_repository(repository: Path, options: ServeOptions) -> None:
    """Write the model repository.

    Raises:
        click.UsageError: an option is for the HTTP server only.
    """
    from goc_deploy.serving.triton_repository import write_repository

    context = click.get_current_context()
    for name in HTTP_ONLY:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is for the HTTP server, not for --triton-repository")
    for folder in write_repository(repository, options):
        click.echo(f"wrote {folder}")
    click.echo(f"next: tritonserver --model-repository {shlex.quote(str(repository.absolute()))}")


main = partial(run_command, command)  # entry point of goc-serve

if __name__ == "__main__":
    raise SystemExit(main())
