"""gunicorn with --preload: the service is made before the fork, and started after it.

GOC_ENGINE=engine gunicorn --preload --chdir examples/serving \\
    -c examples/serving/gunicorn_app.py gunicorn_app:app

``Service(...)`` and the imports may come before the fork, so that the workers share the memory of
the code. What loads engines may not: `Service.start`, `goc_deploy.load`. Their threads and the
thread pool of ONNX Runtime do not survive a fork, and a GPU cannot be used in the child. A request
to a service that was started before the fork raises `EnvironmentUnsupportedError`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from goc_deploy.errors import GocError, UsageError
from goc_deploy.serving import HostedModel, ImageRequest, Service

# This file is also the configuration of gunicorn.
worker_class, workers, threads = "gthread", 2, 8

# Every worker is a process with engines of its own: they share the cores.
cores = max(1, (os.cpu_count() or 1) // workers)
service = Service({"model": HostedModel(os.environ["GOC_ENGINE"], threads=cores)})


def post_fork(_server: Any, _worker: Any) -> None:
    from gunicorn_app import service  # the one of the application, not of the configuration

    service.start()


def worker_exit(_server: Any, _worker: Any) -> None:
    from gunicorn_app import service

    service.drain(30)
    service.close()


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """``GET /?label=3&seed=1`` answers with a PNG."""
    query = parse_qs(environ["QUERY_STRING"])
    try:
        label, seed = (int(query.get(name, ["0"])[0]) for name in ("label", "seed"))
        result = service.generate(ImageRequest("model", labels=[label], seed=seed, deadline=60))
    except (UsageError, ValueError) as error:
        start_response("400 Bad Request", [("Content-Type", "text/plain")])
        return [str(error).encode()]
    except GocError as error:
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [str(error).encode()]
    file = io.BytesIO()
    result.pil()[0].save(file, "PNG")
    start_response("200 OK", [("Content-Type", "image/png")])
    return [file.getvalue()]
