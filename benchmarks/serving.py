"""goc-serve under the load of many clients: latency, images per second, memory, and exact pictures.

    python benchmarks/serving.py engine --plan fora:2 --clients 64 --seconds 300 --rounds 5 \\
        --output docs/performance/serving.json --document docs/serving.md

Two servers run on the loopback address, one with dynamic batching and one without. The cases take
turns in every round. In the last case, clients cancel a share of their requests. Every picture is
compared with that of a serial run of the library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.report import markdown, with_blocks
from benchmarks.serving_clients import (
    BUSY,
    CANCELLED,
    Answers,
    Load,
    Picture,
    answers_of,
    serial_pictures,
)
from benchmarks.serving_process import Sample, ServerProcess
from benchmarks.suite import machine_report

SERVERS = {"dynamic batching": (), "no batching": ("--batch-images", "1")}
SETTLE_SECONDS = 2.0  # from the last answer to the last sample of a case
PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Case:
    """A kind of load on one of the servers.

    Attributes:
        name: what the table calls it.
        server: the name of its server.
        cancels: whether clients cancel requests.
        answers: what clients got in all rounds.
        batches: number of batches of its rounds.
        batch_images: number of images in them.
    """

    name: str
    server: str
    cancels: bool = False
    answers: Answers = field(default_factory=Answers)
    batches: int = 0
    batch_images: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engine directory of a class-conditional model")
    parser.add_argument("--plan", default="fora:2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="of each case, in all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=200, help="that clients choose from")
    parser.add_argument("--cancelled-share", type=float, default=1 / 3)
    parser.add_argument("--sample-seconds", type=float, default=5, help="between two samples")
    parser.add_argument("--output", type=Path, default=Path("out/bench/serving.json"))
    parser.add_argument("--document", type=Path, help="Markdown file whose tables are rewritten")
    args = parser.parse_args(argv)
    found = measured(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    blocks = {"load": answers_table(found), "resources": resources_table(found)}
    print("\n".join(blocks.values()))
    if args.document is not None:
        text = with_blocks(args.document.read_text(encoding="utf-8"), blocks)
        args.document.write_text(text, encoding="utf-8")
    return 0 if all(passed(case) for case in found["cases"].values()) else 1


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and return the numbers."""
    _say(f"drawing {args.pictures} pictures one after the other")
    pictures, serial_seconds = serial_pictures(args.engine, args.plan, args.pictures)
    cases = [
        *(Case(name, name) for name in SERVERS),
        Case("dynamic batching, cancels", "dynamic batching", cancels=True),
    ]
    within = args.clients * serial_seconds / 2  # less than the latency of most requests
    samples: dict[str, list[Sample]] = {}
    exit_codes: dict[str, int] = {}
    with ExitStack() as stack:
        servers = {}
        for name, options in SERVERS.items():
            servers[name] = ServerProcess(args.engine, ["--plan", args.plan, *options])
            stack.callback(servers[name].kill)
            samples[name] = [servers[name].sample()]
        for number in range(args.rounds):
            for case in cases:
                _say(f"round {number + 1} of {args.rounds}: {case.name}")
                share = args.cancelled_share if case.cancels else 0.0
                load = Load(args.clients, args.seconds / args.rounds, share, within, number)
                server = servers[case.server]
                seen = asyncio.run(_run(case, server, pictures, load, args.sample_seconds))
                samples[case.server] += seen
        for name, server in servers.items():
            exit_codes[name] = server.stop()
    return {
        "command": f"python benchmarks/serving.py engine --plan {args.plan} --clients "
        f"{args.clients} --seconds {args.seconds:g} --rounds {args.rounds}",
        **machine_report(),
        "load_average": os.getloadavg()[1],
        "plan": args.plan,
        "clients": args.clients,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "serial_images_per_second": 1 / serial_seconds,
        "cases": {case.name: summary(case) for case in cases},
        "exit_codes": exit_codes,
        "samples": {name: [asdict(one) for one in seen] for name, seen in samples.items()},
    }


async def _run(
    case: Case, server: ServerProcess, pictures: Sequence[Picture], load: Load, every: float
) -> list[Sample]:
    """Run a round of a case; the samples while it ran, and one when all clients have gone."""
    batches, images = server.batches()
    samples: list[Sample] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(every)
            samples.append(server.sample())

    watching = asyncio.create_task(watch())
    case.answers.add(await answers_of(server.url, pictures, load))
    watching.cancel()
    await asyncio.sleep(SETTLE_SECONDS)
    after, after_images = server.batches()
    case.batches += after - batches
    case.batch_images += after_images - images
    return [*samples, server.sample()]


def summary(case: Case) -> dict[str, Any]:
    """The numbers of a case."""
    answers = case.answers
    latencies = np.array(answers.seconds or [np.nan])
    return {
        "pictures": len(answers.seconds),
        "different_pictures": answers.different,
        "statuses": dict(sorted(answers.statuses.items())),
        "wall_seconds": answers.wall_seconds,
        "images_per_second": len(answers.seconds) / answers.wall_seconds,
        "images_per_batch": case.batch_images / max(1, case.batches),
        **{f"p{p}_ms": 1e3 * float(np.percentile(latencies, p)) for p in PERCENTILES},
    }


def passed(case: Mapping[str, Any]) -> bool:
    """Whether all pictures are right, and no answer is an error that is not by design."""
    allowed = {"200", *map(str, BUSY), CANCELLED}
    return case["different_pictures"] == 0 and set(case["statuses"]) <= allowed


def answers_table(found: Mapping[str, Any]) -> str:
    """Latency and images per second of each case."""
    columns = ["case", "pictures", "images/s", *(f"p{p} ms" for p in PERCENTILES)]
    columns += ["images per batch", "equal to the serial run", "answers"]
    rows = []
    for name, case in found["cases"].items():
        times = [f"{case[f'p{p}_ms']:.0f}" for p in PERCENTILES]
        statuses = ", ".join(f"{count} {status}" for status, count in case["statuses"].items())
        shares = [f"{case['images_per_second']:.1f}", *times, f"{case['images_per_batch']:.1f}"]
        right = f"{case['pictures'] - case['different_pictures']} of {case['pictures']}"
        rows.append([name, str(case["pictures"]), *shares, right, statuses])
    table = markdown(columns, rows)
    serial = f"{found['serial_images_per_second']:.1f}"
    return (
        f"{table}\n{found['clients']} clients for {found['seconds']:g} s per case in "
        f"{found['rounds']} rounds, one image per request, plan `{found['plan']}`. One caller of "
        f"the library alone: {serial} images/s. `{found['command']}`, "
        f"{found['machine']['processor']}, {found['machine']['cores']} cores that the clients "
        f"share, load average {found['load_average']:.1f}, {found['date']}.\n"
    )


def resources_table(found: Mapping[str, Any]) -> str:
    """Memory, file descriptors and threads of each server over its life."""
    columns = ["server", "when", "seconds", "resident MB", "file descriptors", "threads"]
    rows = []
    for name, samples in found["samples"].items():
        tenth, half = samples[len(samples) // 10], samples[len(samples) // 2]
        peak = max(samples, key=lambda one: one["resident_bytes"])
        for when, one in (
            ("ready", samples[0]),
            ("a tenth of the time", tenth),
            ("half of the time", half),
            ("peak of memory", peak),
            ("end, without clients", samples[-1]),
        ):
            memory = f"{one['resident_bytes'] / 1e6:.1f}"
            numbers = [memory, str(one["descriptors"]), str(one["threads"])]
            rows.append([name, when, f"{one['seconds']:.0f}", *numbers])
    return markdown(columns, rows)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
