"""Concurrent HTTP clients of goc-serve, which compare every picture with that of a serial run."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import goc_deploy
from goc_deploy.serving.api_schema import base64_png

GENERATE = "/v1/images/generations"
CANCELLED = "cancelled by the client"
BUSY = (429, 503)  # the statuses that ask a client to come back


@dataclass(frozen=True, slots=True)
class Picture:
    """A request for one image, and its expected answer.

    Attributes:
        body: the JSON body of the request.
        png: the PNG of the serial run in base64.
    """

    body: dict[str, Any]
    png: str


@dataclass(slots=True)
class Answers:
    """What clients got.

    Attributes:
        statuses: number of requests by HTTP status, error of the transport, or `CANCELLED`.
        seconds: the latency of each request that got its image.
        different: number of images that are not those of the serial run.
        wall_seconds: from the first request to the last answer.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    different: int = 0
    wall_seconds: float = 0.0

    def add(self, other: Answers) -> None:
        """Add the answers of a later time."""
        self.statuses.update(other.statuses)
        self.seconds += other.seconds
        self.different += other.different
        self.wall_seconds += other.wall_seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What clients do.

    Attributes:
        clients: number of clients, each with one connection and one request at a time.
        seconds: time after which no request begins.
        cancelled_share: share of the requests that are to be cancelled.
        cancelled_within: largest number of seconds after which such a request is cancelled.
        seed: determines the requests and the cancels of each client.
    """

    clients: int
    seconds: float
    cancelled_share: float = 0.0
    cancelled_within: float = 0.0
    seed: int = 0


def serial_pictures(engine: Path, plan: str, count: int) -> tuple[list[Picture], float]:
    """Draw pictures one after the other with the library.

    Args:
        engine: the engine directory of a class-conditional model.
        plan: name or SPEC of the plan.
        count: number of pictures, which differ in label, seed and guidance scale.

    Returns:
        The pictures, and the seconds that one took.

    Raises:
        ValueError: the model makes latents only.
    """
    found: list[Picture] = []
    with goc_deploy.load(engine, plan=plan, backend="onnxruntime") as pipe:
        pipe.warmup((1,))
        started = time.perf_counter()
        for seed in range(count):
            label, scale = seed % pipe.spec.choices, 2.0 + seed % 5
            images = pipe.generate([label], seed=seed, cfg_scale=scale).images
            if images is None:
                raise ValueError(f"{engine} has no decoder, so it makes no pictures")
            body = {"prompt": str(label), "seed": seed, "guidance_scale": scale, "plan": plan}
            found.append(Picture(body, base64_png(images[0])))
        return found, (time.perf_counter() - started) / count


async def answers_of(url: str, pictures: Sequence[Picture], load: Load) -> Answers:
    """Run all clients at once.

    Args:
        url: address of the server.
        pictures: what clients choose from.
        load: what clients do.
    """
    answers, started = Answers(), time.perf_counter()
    clients = [_client(number, url, pictures, load, answers) for number in range(load.clients)]
    await asyncio.gather(*clients)
    answers.wall_seconds = time.perf_counter() - started
    return answers


async def _client(
    number: int, url: str, pictures: Sequence[Picture], load: Load, answers: Answers
) -> None:
    chance = random.Random(f"{load.seed} {number}")
    ends = time.perf_counter() + load.seconds
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while time.perf_counter() < ends:
            picture, patience = chance.choice(pictures), None
            if chance.random() < load.cancelled_share:
                patience = chance.uniform(0, load.cancelled_within)
            started = time.perf_counter()
            try:
                waiting = client.post(GENERATE, json=picture.body)
                answer = await asyncio.wait_for(waiting, patience)
            except TimeoutError:
                answers.statuses[CANCELLED] += 1
                continue
            except httpx.HTTPError as error:
                answers.statuses[type(error).__name__] += 1
                continue
            answers.statuses[str(answer.status_code)] += 1
            if answer.status_code == httpx.codes.OK:
                answers.seconds.append(time.perf_counter() - started)
                answers.different += answer.json()["data"][0]["b64_json"] != picture.png
            elif answer.status_code in BUSY:
                await asyncio.sleep(float(answer.headers["retry-after"]))
