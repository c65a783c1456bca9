"""Measure goc_deploy on a GPU, in minutes.

The parts are ceilings, the update kernel, golden trajectories, and DiT-XL/2 beside PyTorch.

    python benchmarks/gpu.py          # on a GPU; one table, and a JSON file in docs/gpu/
    python benchmarks/gpu.py --dry    # on the CPU with a tiny model, to test this program

Parts run in processes of their own, in order of importance. A part that the time does not suffice
for is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.on_gpu import exports, results, table
from benchmarks.on_gpu.contest import contest
from benchmarks.on_gpu.jobs import DONE, ROOT, Deadline, Job, Outcome, run_part
from benchmarks.on_gpu.machine import machine, safe_name
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.precision import PRECISIONS

SECONDS = 345.0
DRY_SECONDS = 1800.0  # of the run and of each part: machines that test this program may be slow
BACKENDS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
FOR_THE_LAST = 120.0  # seconds that are kept for the last number of images


class Bench:
    """The parts of a run, and what they found so far.

    Args:
        args: of the command line.
        work: folder for engines, logs and partial findings.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.dry, self.work = args, args.dry, work
        self.deadline = Deadline(args.seconds)
        self.subject = exports.DRY if args.dry else replace(exports.DIT, name=args.model)
        self.engines = exports.engines_folder(work)
        self.outcomes: list[Outcome] = []
        self.found: dict[str, Any] = {
            "format": results.FORMAT,
            "dry": args.dry,
            "date": date.today().isoformat(),
            "command": command(args),
            "machine": machine(dry=args.dry),
            "ceilings": None,
            "kernel": [],
            "goldens": [],
            "dit": {
                "model": self.subject.name,
                "precision": self.subject.precision,
                "steps": self.subject.steps,
                "many": list(self.subject.many),
                "runs": [],
            },
        }

    def run(self) -> None:
        """All parts."""
        precisions = () if self.dry else PRECISIONS  # dry, one engine serves both
        goldens = {p: self.engines / f"{exports.GOLDEN}{p}" for p in precisions}
        golden_jobs = {
            p: self._job(f"export golden {p}", "exports", self.engines, "goldens", "--precision", p)
            for p in goldens
        }
        dit_job = self._job(
            "export DiT",
            "exports",
            self.engines,
            *(["dry"] if self.dry else ["dit", "--model", self.subject.name]),
        )
        try:
            dry = ["--dry"] if self.dry else []
            self.found["ceilings"] = self._part("ceilings", 60, *dry)
            self.found["kernel"] = self._part("kernel", 60, *dry) or []
            exported = {p: goldens[p] for p, job in golden_jobs.items() if self._finished(job, 120)}
            if self.dry and self._finished(dit_job, self.deadline.left):
                exported = {self.subject.precision: self.engines / self.subject.folder}
            for backend in self.args.backend:
                self.found["goldens"] += self._goldens(backend, exported)
            if self.dry or self._finished(dit_job, self.deadline.left):
                self._contest()
        finally:
            for job in (*golden_jobs.values(), dit_job):
                job.kill()

    def _goldens(self, backend: str, engines: Mapping[str, Path]) -> list[dict[str, Any]]:
        if not engines:
            return []
        words = [
            word
            for precision, engine in engines.items()
            for word in ("--engine", f"{precision}={engine}")
        ]
        graphs = ["--no-cuda-graphs"] if self.args.no_cuda_graphs else []
        return self._part(f"goldens {backend}", 100, "--backend", backend, *words, *graphs) or []

    def _contest(self) -> None:
        absent = {
            e["backend"]
            for e in self.found["goldens"]
            if "not_here" in e and e["precision"] == "fp32"
        }
        backends = [backend for backend in self.args.backend if backend not in absent]
        if find_spec("torch") is None:
            print("torch is not installed: there are no rows of PyTorch", flush=True)
        for images in self.subject.images:
            last = images == self.subject.images[-1]
            left = self.deadline.left
            limit = left if last else max(left - FOR_THE_LAST, left / 2)
            print(f"+ {self.subject.name}, {images} images ({limit:.0f} s at most)", flush=True)
            self.found["dit"]["runs"].append(
                contest(
                    self.subject,
                    self.engines,
                    self.work,
                    images,
                    backends,
                    Deadline(limit),
                    trace=self._beside(f"{images}-images.trace.json"),
                    graphs=not self.args.no_cuda_graphs,
                    dry=self.dry,
                )
            )

    def _job(self, name: str, module: str, *words: object) -> Job:
        command = [sys.executable, "-m", f"benchmarks.on_gpu.{module}", *map(str, words)]
        return Job(name, command, self.work / f"{safe_name(name)}.log")

    def _part(self, name: str, limit_s: float, *words: str) -> Any:
        """Run a part and return its findings.

        If the part failed, these are the findings before the failure, or None.
        """
        module, found = name.split()[0], self.work / f"{safe_name(name)}.json"
        found.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"benchmarks.on_gpu.{module}", str(found), *words]
        limit_s = DRY_SECONDS if self.dry else limit_s
        outcome = run_part(
            name, command, self.work / f"{safe_name(name)}.log", self.deadline, limit_s
        )
        self._note(outcome)
        return json.loads(found.read_text(encoding="utf-8")) if found.exists() else None

    def _finished(self, job: Job, limit_s: float) -> bool:
        outcome = job.finish(self.deadline.limit(limit_s))
        self._note(outcome)
        return outcome.state == DONE

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(
            f"+ {outcome.part}: {outcome.state} in {outcome.seconds:.0f} s "
            f"{outcome.reason}".rstrip(),
            flush=True,
        )

    def finish(self) -> None:
        """Judge, write the file and print the table."""
        backends = [
            b for b in self.args.backend if any(_names(run, b) for run in self.found["dit"]["runs"])
        ]
        self.found["targets"] = (
            [] if self.dry else results.judged(self.found["dit"]["runs"], backends)
        )
        self.found["parts"] = [
            {"part": o.part, "state": o.state, "seconds": round(o.seconds, 1), "reason": o.reason}
            for o in self.outcomes
        ]
        results.check(self.found)
        path = self._beside(".json")
        path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(table.table(self.found), path, sep="\n", flush=True)

    @property
    def good(self) -> bool:
        """Whether every part and contender that can run here did, and the goldens are met."""
        goldens = [e for e in self.found["goldens"] if "not_here" not in e]
        met = all(e["worst_step"] is not None and e["worst_step"] < e["most"] for e in goldens)
        runs = self.found["dit"]["runs"]
        done = all(outcome.state == DONE for outcome in self.outcomes) and len(runs) == len(
            self.subject.images
        )
        return done and met and bool(goldens) and not any(run["failed"] for run in runs)

    def _beside(self, ending: str) -> Path:
        self.args.output.mkdir(parents=True, exist_ok=True)
        name = f"{safe_name(self.found['machine']['card'])}-{self.found['date']}"
        return self.args.output / (
            f"{name}{ending}" if ending.startswith(".") else f"{name}-{ending}"
        )


def command(args: argparse.Namespace) -> str:
    """The command line again, without folders, and with the defaults that this run took."""
    words = [
        "--model",
        args.model,
        "--seconds",
        f"{args.seconds:.0f}",
        *(word for name in args.backend for word in ("--backend", name)),
    ]
    flags = {"--no-cuda-graphs": args.no_cuda_graphs, "--dry": args.dry}
    return shlex.join(
        ["python", "benchmarks/gpu.py", *words, *(flag for flag, on in flags.items() if on)]
    )


def _names(run: dict[str, Any], backend: str) -> bool:
    return any(name.startswith(f"{backend} ") for name in run["contenders"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the JSON file and traces  [default: docs/gpu, dry: temporary]",
    )
    parser.add_argument(
        "--work", type=Path, help="folder of engines and logs, kept  [default: out/gpu]"
    )
    parser.add_argument(
        "--backend", action="append", help=f"of ours; repeatable  [default: {', '.join(BACKENDS)}]"
    )
    parser.add_argument(
        "--model", default=exports.DIT.name, help="S/2, B/2, L/2 or XL/2  [default: %(default)s]"
    )
    parser.add_argument("--seconds", type=float, help=f"when to be over  [default: {SECONDS:.0f}]")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch our steps one by one")
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU, with a tiny model, one round"
    )
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (DRY_SECONDS if args.dry else SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="goc-gpu-")))
        args.output = (args.output or (temporary if args.dry else ROOT / "docs" / "gpu")).resolve()
        args.backend = args.backend or (["onnxruntime"] if args.dry else list(BACKENDS))
        work = (
            args.work or (temporary if args.dry else ROOT / "out" / "gpu")
        ).resolve()  # parts run in the root
        work.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
        try:
            bench = Bench(args, work)
        except RuntimeError as reason:
            print(f"error: {reason}", file=sys.stderr)
            return EnvironmentUnsupportedError.exit_code
        try:
            bench.run()
        finally:
            bench.finish()
    return 0 if bench.good else 1


if __name__ == "__main__":
    raise SystemExit(main())
