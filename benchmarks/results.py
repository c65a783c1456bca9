"""Quality of plans over many samples: the tables of docs/results.md.

    python benchmarks/results.py engine --reference digits.npz --images 10000 \\
        --document docs/results.md [--do clock]

Rows stand in benchmarks/results.toml. Samples of a row stay in the work folder and its numbers in
another: an interrupted run continues, and rows that are done are not made again. ``--do clock``
measures how long every plan takes, side by side; leave the machine idle meanwhile. ``--do plans``
writes once more what the plans of measured rows compute. ``--do show`` measures nothing.

Generated parts of the document stand between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, one
per table; a table shows the rows that have numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.report import markdown, with_blocks
from benchmarks.rows import COST, Row, Study, contents_of, cost_cells, god_text, update_contents
from benchmarks.sampled_rows import Request, Workers, chunks_of, engine_digest, sample
from goc_deploy.api import add_plan
from goc_deploy.api.bench import compare_plans
from goc_deploy.disk import save_text
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import GocError
from goc_deploy.evaluation.distribution import FeatureSet, distribution_metrics, reference_from_adm
from goc_deploy.evaluation.features import OnnxExtractor
from goc_deploy.evaluation.pairing import PairedScores
from goc_deploy.evaluation.sampling import Sampled
from goc_deploy.evaluation.tables import METRICS, shown_value
from goc_deploy.metrics.estimate import Estimate
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import BenchOptions, no_progress
from goc_deploy.runtime.adm import open_adm
from goc_deploy.runtime.images import images_from_latents
from goc_deploy.schedule import Schedule

HERE = Path(__file__).resolve().parent
MNIST = HERE.parent / "examples" / "mnist"
RESAMPLES = 50
CLOCK_ROUNDS = 15
TIMES = "times.json"
Samples = tuple[Path, Request]  # where the chunks lie, and what they are of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engine directory; plans are added to it")
    parser.add_argument("--rows", type=Path, default=HERE / "results.toml")
    parser.add_argument("--work", type=Path, default=Path("out/results"), help="folder of samples")
    parser.add_argument(
        "--numbers",
        type=Path,
        default=HERE.parent / "docs/results",
        help="folder of a JSON per row",
    )
    parser.add_argument("--do", choices=("measure", "clock", "plans", "show"), default="measure")
    parser.add_argument("--tables", help="comma-separated, of the rows file  [default: all]")
    parser.add_argument("--images", type=int, default=10_000, help="per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--features", type=Path, default=MNIST / "classifier.onnx")
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="ADM .npz, from examples/mnist/make_reference.py",
    )
    # Measured on two cores, one of them half busy, images per second of 20 uncached steps of the
    # demo model: two processes of one thread 20.3, 19.0 and 14.5 at batch 8, 16 and 40; one process
    # of two threads 4.4, 5.4 and 5.8.
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--chunk-images",
        type=int,
        default=200,
        help="what an interruption loses at most, per process",
    )
    parser.add_argument(
        "--document", type=Path, help="rewrite its blocks; without it the tables go to stdout"
    )
    args = parser.parse_args(argv)
    try:
        blocks = make_tables(args)
    except GocError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    if args.document:
        save_text(with_blocks(args.document.read_text(encoding="utf-8"), blocks), args.document)
    else:
        print("\n".join(blocks.values()))
    return 0


def make_tables(args: argparse.Namespace) -> dict[str, str]:
    """Sample and measure all missing rows, or clock all; returns block name -> Markdown."""
    wanted = tomllib.loads(args.rows.read_text(encoding="utf-8"))
    tables = {
        table["name"]: (table["title"], [Row(**row) for row in table["rows"]])
        for table in wanted["table"]
    }
    manifest = EngineDir.open(args.engine).manifest
    extractor = OnnxExtractor(args.features)
    study = Study(
        args.engine,
        args.work,
        args.numbers,
        Request(
            "",
            args.images,
            args.seed,
            args.cfg_scale,
            manifest.model.choices,
            args.chunk_images,
            "",
        ),
        Workers(args.processes, args.threads, args.batch_size),
        extractor,
        reference_from_adm(open_adm(args.reference), extractor, no_progress),
        int(wanted["calibration_images"]),
        next(iter(tables.values()))[1][0],
        Row("", "none", int(wanted["converged_steps"])),
        min(args.images, int(wanted["converged_images"])),
        tuple(wanted.get("metrics", ())),
    )
    args.numbers.mkdir(parents=True, exist_ok=True)
    shown = args.tables.split(",") if args.tables else list(tables)
    rows = [row for name in shown for row in tables[name][1]]
    if args.do == "clock":
        clock(study, rows)
    for row in rows if args.do == "measure" else ():
        measure(study, row)
    for row in rows if args.do == "plans" else ():
        update_contents(study.path(row), schedule_of(study, row))
    return {name: block(study, title, rows) for name, (title, rows) in tables.items()}


def sampled(study: Study, row: Row, images: int) -> Samples:
    """The folder and request of a row's samples, which are made where they are missing."""
    add(study, row)
    digest = engine_digest(EngineDir.open(study.engine), row.plan)
    request = replace(study.request, plan=row.plan, images=images, engine=digest)
    folder = study.work / (row.plan if images == study.request.images else f"{row.plan}.{images}")
    sample(folder, request, study.engine, study.workers, say)
    return folder, request


def add(study: Study, row: Row) -> None:
    """Add a row's plan to the engine directory, unless it is there."""
    if all(entry.name != row.plan for entry in EngineDir.open(study.engine).manifest.plans):
        say(f"making {row.spec}")
        calibration = {"calibrate": study.calibration_images, "cfg_scale": study.request.cfg_scale}
        add_plan(
            study.engine,
            row.spec,
            name=row.plan,
            steps=row.steps or None,
            sampler=row.sampler,
            **calibration,
        )


def schedule_of(study: Study, row: Row) -> Schedule:
    """Of a row's plan, which is made where it is missing."""
    add(study, row)
    return EngineDir.open(study.engine).plan(row.plan).schedule


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def measure(study: Study, row: Row) -> None:
    """Sample a row and write its numbers, unless they are there."""
    path, made_for = study.path(row), study.made_for()
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["made_for"] == made_for:
        return
    samples = sampled(study, row, study.request.images)
    _, request = samples
    schedule = schedule_of(study, row)
    estimates = paired_metrics(study, replace(row, steps=schedule.steps), samples)
    features = FeatureSet(request.images)
    for _, latents in chunks_of(*samples):
        features.add(study.extractor.extract(pictures(latents)))
    estimates |= distribution_metrics(
        features, request.labels, request.classes, study.reference, RESAMPLES, request.seed
    )
    found = {
        "made_for": made_for,
        "spec": row.spec,
        "sampler": row.sampler,
        **contents_of(schedule),
        "metrics": {key: asdict(value) for key, value in estimates.items()},
    }
    save_text(json.dumps(found, indent=1) + "\n", path)


def paired_metrics(study: Study, row: Row, samples: Samples) -> dict[str, Estimate]:
    """Distances to the baseline and to the converged solution.

    The first exists if the row has the steps and the sampler of the baseline.
    """
    scores = PairedScores()
    baseline = study.baseline
    if (row.steps, row.sampler) == (baseline.steps, baseline.sampler) and row.spec != baseline.spec:
        uncached = sampled(study, baseline, study.request.images)
        for (_, found), (_, expected) in zip(
            chunks_of(*samples), chunks_of(*uncached), strict=True
        ):
            scores.add(
                *(Sampled(latents, pictures(latents), None, {}) for latents in (found, expected))
            )
    converged = sampled(study, study.converged, study.converged_images)
    for (_, found), (_, truth) in zip(chunks_of(*samples), chunks_of(*converged), strict=False):
        scores.add_values("converged_relative_l2", relative_l2(found[: len(truth)], truth))
    return scores.estimates(study.request.seed)


def clock(study: Study, rows: Sequence[Row]) -> None:
    """Run the plans side by side, one image per class, and write what each takes."""
    unique = {row.plan: row for row in (study.baseline, *rows)}
    for row in unique.values():
        add(study, row)
    labels = tuple(range(study.request.classes))
    options = BenchOptions(
        tuple(unique), labels=labels, cfg_scale=study.request.cfg_scale, repeats=CLOCK_ROUNDS
    )
    plans = compare_plans(
        study.engine, options, lambda what, done, total: say(f"{what} ({done} of {total})")
    )["plans"]
    found = {
        "images": len(labels),
        "rounds": CLOCK_ROUNDS,
        "threads": os.cpu_count(),
        "total_ms": {name: plan["total_ms"] for name, plan in plans.items()},
    }
    save_text(json.dumps(found, indent=1) + "\n", study.numbers / TIMES)


def pictures(latents: np.ndarray) -> np.ndarray:
    """Latents of a pixel-space model as (N, H, W, C) uint8."""
    images = images_from_latents(latents)
    assert images is not None, "the model's latents need a decoder"
    return images


def block(study: Study, title: str, rows: Sequence[Row]) -> str:
    """A table of cost and quality as Markdown, with what it was made with."""
    made_for = study.made_for()
    found = [
        (row, json.loads(study.path(row).read_text(encoding="utf-8")))
        for row in rows
        if study.path(row).exists()
    ]
    found = [(row, numbers) for row, numbers in found if numbers["made_for"] == made_for]
    if not found:
        return f"### {title}\n\nNot measured yet.\n"
    times_path = study.numbers / TIMES
    times = json.loads(times_path.read_text(encoding="utf-8")) if times_path.exists() else {}
    totals = times.get("total_ms", {})
    present = [
        metric
        for metric in METRICS
        if any(metric.key in numbers["metrics"] for _, numbers in found)
    ]
    shown = [metric for metric in present if not study.metrics or metric.key in study.metrics]
    model = EngineDir.open(study.engine).manifest.model
    god = any("god" in numbers for _, numbers in found)
    columns = ["method", "SPEC", "steps", *COST, "speed-up", *(["GOD decided"] if god else [])]
    lines = []
    for row, numbers in found:
        speed = (
            f"{totals[study.baseline.plan] / totals[row.plan]:.2f}" if row.plan in totals else ""
        )
        decided = [god_text(numbers.get("god"))] if god else []
        values = [shown_value(numbers["metrics"].get(metric.key), metric, "±") for metric in shown]
        steps = (
            f"{numbers['steps']}" if row.sampler == "ddim" else f"{numbers['steps']} {row.sampler}"
        )
        lines.append(
            [
                row.title,
                f"`{row.spec}`",
                steps,
                *cost_cells(numbers, model),
                speed,
                *decided,
                *values,
            ]
        )
    columns += [metric.title for metric in shown]
    return f"### {title}\n\n{markdown(columns, lines)}\n{conditions(study, times)}"


def conditions(study: Study, times: dict[str, Any]) -> str:
    """What the numbers of a table were made with."""
    request = study.request
    speed = (
        f" Speed-up is relative to no cache, for {times['images']} images at once, with "
        f"{times['threads']} threads, "
        f"as the median of {times['rounds']} interleaved rounds."
        if times
        else ""
    )
    return (
        f"{request.images} samples per row, guidance {request.cfg_scale:g}, seed {request.seed}, "
        f"features of `{study.extractor.name}`. Plans that need calibration used "
        f"{study.calibration_images} images of another seed, unless their SPEC has another number. "
        f"± is half of a 95 % interval, with {RESAMPLES} resamples for FID and IS. L2 to converged "
        f"is the distance from {study.converged.steps} uncached steps over "
        f"{study.converged_images} images. FLOPs are those of the matrix products, per image."
        f"{speed}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
