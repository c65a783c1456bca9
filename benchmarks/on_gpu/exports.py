"""The engine directories that the benchmarks run, made once and kept.

They are golden models by precision, and a DiT.

python -m benchmarks.on_gpu.exports WORK/engines-... dit
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.on_gpu import goldens
from benchmarks.on_gpu.jobs import ROOT

PLANS = ("none", "fora:2", "fora:2+gc:1.2")
GOLDEN = "golden-"


@dataclass(frozen=True, slots=True)
class Subject:
    """The DiT that is measured.

    Attributes:
        name: ``XL/2`` (or another public size) with random weights, or ``golden``, the model of the
            golden trajectories.
        precision: of the engine.
        steps: of plans and of PyTorch.
        many: (plan, steps) of one that predicts most of many steps.
        images: runs of so many images are measured.
    """

    name: str
    precision: str
    steps: int
    many: tuple[str, int]
    images: tuple[int, ...]

    @property
    def heads(self) -> int | None:
        """Attention heads, where the width does not tell."""
        return goldens.HEADS if self.name == "golden" else None

    @property
    def folder(self) -> str:
        """File-safe and unique."""
        return f"dit-{self.name.replace('/', '-')}-{self.precision}"

    def checkpoint(self, engines: Path) -> Path:
        """Where its weights are, or will be."""
        return (
            goldens.CHECKPOINT
            if self.name == "golden"
            else engines / f"{self.name.replace('/', '-')}.pt"
        )


MANY = ("fora:5+lagrange:2,history=computed", 50)  # 10 of 50 steps computed; needs no calibration
DIT = Subject("XL/2", "fp16", 20, MANY, (1, 8))
DRY = Subject("golden", "fp32", 20, MANY, (1,))


def engines_folder(work: Path) -> Path:
    """The folder for engines of this version of the exporter.

    If the exporter's sources change, the engines are exported again.
    """
    digest = hashlib.sha256()
    for path in sorted(
        [*(ROOT / "exporters").glob("**/*.py"), *(ROOT / "goc_deploy").glob("*.py")]
    ):
        digest.update(path.read_bytes())
    return work / f"engines-{digest.hexdigest()[:12]}"


def export_golden(engines: Path, precision: str) -> None:
    """The golden model with the plans that are compared."""
    _export(goldens.CHECKPOINT, engines / f"{GOLDEN}{precision}", precision, goldens.HEADS, 20, 16)


def export_subject(engines: Path, subject: Subject) -> None:
    """The DiT with its plans.

    It appears whole or not at all, so a second call finds it or makes it.
    """
    target = engines / subject.folder
    if target.exists():
        return
    checkpoint = subject.checkpoint(engines)
    if not checkpoint.exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.make_checkpoint", subject.name, str(checkpoint)],
            check=True,
        )
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _export(
        checkpoint, unfinished, subject.precision, subject.heads, subject.steps, max(subject.images)
    )
    plan, steps = subject.many
    _command("plan", unfinished, plan, "--name", "many", "--steps", steps)
    os.replace(unfinished, target)


def _export(
    checkpoint: Path, target: Path, precision: str, heads: int | None, steps: int, most: int
) -> None:
    if target.exists():
        return
    plans = [word for plan in PLANS for word in ("--plan", plan)]
    sizes = ["--precision", precision, "--steps", steps, "--max-batch", most]
    _command(
        "export",
        checkpoint,
        "-o",
        target,
        *sizes,
        *plans,
        *(["--num-heads", heads] if heads else []),
    )


def _command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "goc_deploy", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", type=Path)
    parser.add_argument("what", choices=["goldens", "dit", "dry"])
    parser.add_argument("--model", default=DIT.name, help="public size of the DiT")
    parser.add_argument("--precision", action="append", help="of golden models")
    args = parser.parse_args()
    args.engines.mkdir(parents=True, exist_ok=True)
    if args.what == "goldens":
        for precision in args.precision:
            export_golden(args.engines, precision)
    else:
        export_subject(args.engines, replace(DIT, name=args.model) if args.what == "dit" else DRY)


if __name__ == "__main__":
    main()
