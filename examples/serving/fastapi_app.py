"""FastAPI by hand: the service is loaded in the lifespan of the application, that is, per worker.

GOC_ENGINE=engine uvicorn --app-dir examples/serving fastapi_app:app
"""

from __future__ import annotations

import asyncio
import io
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Response

from goc_deploy.errors import DeadlineError, NotReadyError, OverloadedError, UsageError
from goc_deploy.serving import ImageRequest, Service


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Service({"model": os.environ["GOC_ENGINE"]}) as app.state.service:
        yield
        await asyncio.to_thread(app.state.service.drain, 30)


app = FastAPI(lifespan=lifespan)


@app.get("/images/{label}")
async def image(label: int, seed: int = 0) -> Response:
    request = ImageRequest("model", labels=[label], seed=seed, deadline=60)
    try:
        result = await app.state.service.agenerate(request)
    except UsageError as error:
        raise HTTPException(400, str(error)) from error
    except OverloadedError as error:
        wait = str(math.ceil(error.retry_after))
        raise HTTPException(429, str(error), {"Retry-After": wait}) from error
    except NotReadyError as error:
        raise HTTPException(503, str(error)) from error
    except DeadlineError as error:
        raise HTTPException(504, str(error)) from error
    file = io.BytesIO()
    result.pil()[0].save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png")


@app.get("/ready")
async def ready() -> Response:
    return Response(status_code=200 if app.state.service.ready() else 503)
