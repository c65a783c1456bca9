"""Quality of plans over many samples: the tables of docs/results.md.

    python benchmarks/results.py engine --work out/results --images 10000 --document docs/results.md

Rows stand in benchmarks/results.toml. Samples and numbers of a row stay in the work folder: an interrupted run goes on
where it stopped, and rows that are done are not made again. Generated parts of the document stand between
``<!-- begin NAME -->`` and ``<!-- end NAME -->``, one per table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.report import markdown, with_blocks
from benchmarks.sampled_rows import Request, Workers, chunks_of, engine_digest, ms_per_image, sample, write_adm
from goc_deploy.api import add_plan
from goc_deploy.engine_dir import load_plan
from goc_deploy.errors import GocError
from goc_deploy.evaluation.adm import open_adm
from goc_deploy.evaluation.distribution import FeatureSet, Reference, distribution_metrics, reference_from_adm
from goc_deploy.evaluation.features import Extractor, OnnxExtractor
from goc_deploy.evaluation.pairing import PairedScores
from goc_deploy.evaluation.sampling import Sampled
from goc_deploy.evaluation.tables import METRICS, shown_value
from goc_deploy.grammar import parse_policy, plan_name_from_spec
from goc_deploy.metrics.estimate import Estimate
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import no_progress
from goc_deploy.outputs import save_text
from goc_deploy.publish import read_manifest
from goc_deploy.runtime.images import images_from_latents

HERE = Path(__file__).resolve().parent
MNIST = HERE.parent / "examples" / "mnist"
RESAMPLES = 50
Samples = tuple[Path, Request]  # where the chunks lie, and what they are of


@dataclass(frozen=True, slots=True)
class Row:
    """A plan that the tables show."""

    title: str
    spec: str
    steps: int
    sampler: str = "ddim"

    @property
    def plan(self) -> str:
        """Its name in the engine directory."""
        sampler = "" if self.sampler == "ddim" else f".{plan_name_from_spec(self.sampler)}"
        return f"{parse_policy(self.spec).default_name[:80]}.T{self.steps}{sampler}"

    @property
    def baseline(self) -> Row:
        """The same sampler and number of steps without a cache."""
        return Row("", "none", self.steps, self.sampler)


@dataclass(frozen=True, slots=True)
class Study:
    """What every row shares."""

    engine: Path
    work: Path
    request: Request  # of no plan in particular
    workers: Workers
    extractor: Extractor
    reference: Reference


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engine directory; plans are added to it")
    parser.add_argument("--rows", type=Path, default=HERE / "results.toml")
    parser.add_argument("--work", type=Path, default=Path("out/results"), help="folder of samples and numbers")
    parser.add_argument("--images", type=int, default=10_000, help="per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--features", type=Path, default=MNIST / "classifier.onnx")
    parser.add_argument("--reference", type=Path, required=True, help="ADM .npz, from examples/mnist/make_reference.py")
    # Measured on two cores, one of them half busy, images per second of 20 uncached steps of the demo model: two
    # processes of one thread 20.3, 19.0 and 14.5 at batch 8, 16 and 40; one process of two threads 4.4, 5.4 and 5.8.
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk-images", type=int, default=200, help="what an interruption loses at most, per process")
    parser.add_argument("--document", type=Path, help="rewrite its blocks; without it the tables go to stdout")
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
    """Sample and measure every row that is not done yet; returns block name -> Markdown."""
    wanted = tomllib.loads(args.rows.read_text(encoding="utf-8"))
    tables = {table["name"]: (table["title"], [Row(*row) for row in table["rows"]]) for table in wanted["table"]}
    manifest = read_manifest(args.engine)
    extractor = OnnxExtractor(args.features)
    study = Study(
        args.engine,
        args.work,
        Request("", args.images, args.images, args.seed, args.cfg_scale, manifest.model.classes, args.chunk_images, ""),
        Workers(args.processes, args.threads, args.batch_size),
        extractor,
        reference_from_adm(open_adm(args.reference), extractor, no_progress),
    )
    truth = Row("converged", "none", int(wanted["converged_steps"]))
    converged = sampled(study, truth, min(args.images, int(wanted["converged_images"])))
    blocks = {}
    for name, (title, rows) in tables.items():
        found = [measured(study, row, converged) for row in rows]
        blocks[name] = f"### {title}\n\n{table_of(rows, found)}\n{conditions(study, converged[1])}"
    return blocks


def sampled(study: Study, row: Row, images: int) -> Samples:
    """The folder and request of a row's samples, which are made where they are missing."""
    manifest = read_manifest(study.engine)
    if all(entry.name != row.plan for entry in manifest.plans):
        add_plan(study.engine, row.spec, name=row.plan, steps=row.steps, sampler=row.sampler)
        manifest = read_manifest(study.engine)
    request = replace(study.request, plan=row.plan, images=images, engine=engine_digest(manifest, row.plan))
    folder = study.work / (row.plan if images == study.request.images else f"{row.plan}.{images}")
    sample(folder, request, study.engine, study.workers, lambda line: print(line, file=sys.stderr, flush=True))
    return folder, request


def measured(study: Study, row: Row, converged: Samples) -> dict[str, Any]:
    """Every number of a row; they are kept beside its samples."""
    samples = sampled(study, row, study.request.images)
    made_for = {
        "features": study.extractor.name,
        "reference": study.reference.images,
        "converged": asdict(converged[1]),
    }
    path = samples[0] / "row.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_for"] == made_for:
            return kept
    _, request = samples
    estimates = paired_metrics(samples, sampled(study, row.baseline, study.request.images), converged)
    features = FeatureSet(request.images)
    for _, latents in chunks_of(*samples):
        features.add(study.extractor.extract(pictures(latents)))
    estimates |= distribution_metrics(
        features, request.labels, request.classes, study.reference, RESAMPLES, request.seed
    )
    write_adm(*samples)
    schedule = load_plan(study.engine, read_manifest(study.engine), row.plan).schedule
    found = {
        "made_for": made_for,
        "row": asdict(row),
        "request": asdict(request),
        "full_step_equivalents": schedule.computed / schedule.units,
        "ms_per_image": ms_per_image(*samples),
        "metrics": {key: asdict(value) for key, value in estimates.items()},
    }
    save_text(json.dumps(found, indent=1) + "\n", path)
    return found


def paired_metrics(samples: Samples, baseline: Samples, converged: Samples) -> dict[str, Estimate]:
    """Distances to the baseline (none where that is the row itself) and to the converged solution."""
    scores, (folder, request) = PairedScores(), samples
    if baseline[0] != folder:
        for (_, found), (_, expected) in zip(chunks_of(*samples), chunks_of(*baseline), strict=True):
            scores.add(*(Sampled(latents, pictures(latents), None, {}) for latents in (found, expected)))
    for (_, found), (_, truth) in zip(chunks_of(*samples), chunks_of(*converged), strict=False):
        scores.add_values("converged_relative_l2", relative_l2(found[: len(truth)], truth))
    return scores.estimates(request.seed)


def pictures(latents: np.ndarray) -> np.ndarray:
    """Latents of a pixel-space model as (N, H, W, C) uint8."""
    images = images_from_latents(latents)
    assert images is not None, "the model's latents need a decoder"
    return images


def table_of(rows: Sequence[Row], found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of cost and quality."""
    shown = [metric for metric in METRICS if any(metric.key in one["metrics"] for one in found)]
    columns = ["method", "SPEC", "steps", "full steps", "ms/image", *(metric.title for metric in shown)]
    lines = []
    for row, one in zip(rows, found, strict=True):
        cost = [f"{one['full_step_equivalents']:.2f}", f"{one['ms_per_image']:.1f}"]
        values = [shown_value(one["metrics"].get(metric.key), metric, "±") for metric in shown]
        steps = str(row.steps) if row.sampler == "ddim" else f"{row.steps} {row.sampler}"
        lines.append([row.title, f"`{row.spec}`", steps, *cost, *values])
    return markdown(columns, lines)


def conditions(study: Study, converged: Request) -> str:
    """What the numbers of a table were made with."""
    request = study.request
    return (
        f"{request.images} samples per row, guidance {request.cfg_scale:g}, seed {request.seed}, features of "
        f"`{study.extractor.name}`; ± is half of a 95 % interval, {RESAMPLES} resamples for FID and IS; "
        f"L2 to converged is to {converged.plan.rpartition('.T')[2]} uncached steps over {converged.images} images.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
