"""The tests that need a GPU, in parts, within minutes.

The parts run one after the other in processes of their own.

    python -m tests.on_gpu          # one table, and a JSON file in docs/gpu/
    python -m tests.on_gpu --dry    # on any machine: the tests are collected and skip

A test that ends its process counts as crashed, and the rest of its part runs without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.on_gpu.jobs import DONE, ROOT, Deadline, Job
from benchmarks.on_gpu.machine import machine, safe_name
from benchmarks.report import markdown
from goc_deploy.errors import EnvironmentUnsupportedError

SECONDS = 225.0
PART_SECONDS = 120.0
DRY_SECONDS = 1800.0  # of both: machines that test this program may be slow
LEAST_SECONDS = 10.0  # no part begins with less
# Parts in order of importance, and which tests belong to them; each test belongs to the first that
# fits.
PARTS = {
    "tensorrt-rtx": r"tensorrt-rtx",
    "tensorrt": r"\[[^\]]*tensorrt",
    "kernel": r"plugin/",
    "onnxruntime-cuda": r"onnx_?runtime",
    "device": r"device|copies|stream",
    "others": r"",
}
ORDER = ("kernel", "device", "onnxruntime-cuda", "others", "tensorrt", "tensorrt-rtx")
_VERDICT = re.compile(r"^(tests/.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)
_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.+)$", re.MULTILINE)
_FAILED = re.compile(r"^((?:FAILED|ERROR) tests/.+)$", re.MULTILINE)


@dataclass(slots=True)
class Part:
    """What became of the tests of a part, by their ids."""

    name: str
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0


def files_with_gpu_tests() -> list[str]:
    """Those that carry the mark; collecting all tests would take most of a minute."""
    paths = sorted((ROOT / "tests").glob("**/test_*.py"))
    marked = [
        p
        for p in paths
        if re.search(r"^\s*(pytestmark\b.*|@)pytest\.mark\.gpu\b", p.read_text(), re.MULTILINE)
    ]
    return [str(path.relative_to(ROOT)) for path in marked]


def collected() -> list[str]:
    """Ids of all tests that need a GPU.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--collect-only",
        "-q",
        *files_with_gpu_tests(),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pytest cannot collect the tests:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def divided(ids: Iterable[str]) -> dict[str, list[str]]:
    """Tests by part, in the order in which parts run."""
    found: dict[str, list[str]] = {name: [] for name in ORDER}
    for test in ids:
        found[next(name for name, pattern in PARTS.items() if re.search(pattern, test))].append(
            test
        )
    return {name: tests for name, tests in found.items() if tests}


def run(name: str, tests: Sequence[str], own: Deadline, log: Path) -> Part:
    """Run the tests of a part until none is left, or no time."""
    part, left = Part(name), list(tests)
    while left:
        if own.left < LEAST_SECONDS:
            part.left_out += left
            break
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-v",
            "-ra",
            "-p",
            "no:cacheprovider",
            *left,
        ]
        job = Job(name, words, log)
        try:
            outcome = job.finish(own.left)
        finally:
            job.kill()
        part.seconds += outcome.seconds
        noted = note(part, log.read_text(encoding="utf-8", errors="replace"))
        left = [test for test in left if test not in noted]
        if outcome.state == DONE or not left:
            break
        if job.process.returncode > 0:  # pytest itself says that it cannot go on
            part.crashed += left
            part.reasons.append(outcome.reason)
            break
        culprit = left.pop(0)  # it had begun when the process was ended
        part.crashed.append(culprit)
        part.reasons.append(f"{culprit}: {outcome.reason}")
    return part


def note(part: Part, log: str) -> set[str]:
    """Add the verdicts of a log of pytest to a part; which tests have one."""
    lists = {"PASSED": part.passed, "SKIPPED": part.skipped, "XFAIL": part.skipped}
    verdicts = {match[1]: match[2] for match in _VERDICT.finditer(log)}
    for test, verdict in verdicts.items():
        lists.get(verdict, part.failed).append(test)
    part.reasons += [f"{number} skipped: {reason}" for number, reason in _SKIPPED.findall(log)]
    part.reasons += _FAILED.findall(log)
    return set(verdicts)


def table(parts: Sequence[Part]) -> str:
    """Markdown: a row per part, and below it why tests failed or were skipped."""
    counts = ("passed", "failed", "crashed", "skipped", "left_out")
    rows = [
        [p.name, *(str(len(getattr(p, key))) for key in counts), f"{p.seconds:.0f}"] for p in parts
    ]
    reasons = [f"{p.name}: {reason}" for p in parts for reason in dict.fromkeys(p.reasons)]
    return "\n".join([markdown(["part", *counts, "seconds"], rows), *reasons])


def exit_code(parts: Sequence[Part], *, dry: bool) -> int:
    """0 if every test passed or had a reason to skip.

    Not all may have skipped, unless the run was dry.
    """
    if any(part.failed or part.crashed or part.left_out for part in parts):
        return 1
    return 0 if dry or any(part.passed for part in parts) else EnvironmentUnsupportedError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, help="folder of the JSON file  [default: docs/gpu, dry: none]"
    )
    parser.add_argument("--seconds", type=float, help=f"when to be over  [default: {SECONDS:.0f}]")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    args = parser.parse_args(argv)
    deadline = Deadline(args.seconds or (DRY_SECONDS if args.dry else SECONDS))
    try:
        where, tests = machine(dry=args.dry), divided(collected())
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return EnvironmentUnsupportedError.exit_code
    parts = []
    with tempfile.TemporaryDirectory(prefix="goc-gpu-tests-") as folder:
        os.environ["GOC_TEST_ENGINES"] = folder  # one export for all parts
        for name, ids in tests.items():
            print(f"+ {name}: {len(ids)} tests, {deadline.left:.0f} s are left", flush=True)
            own = Deadline(deadline.limit(DRY_SECONDS if args.dry else PART_SECONDS))
            parts.append(run(name, ids, own, Path(folder) / f"{name}.log"))
    title = (
        f"{where['card']}, driver {where['driver']}"
        if not args.dry
        else "dry run: nothing ran on a GPU"
    )
    print(f"{title}, {date.today().isoformat()}\n\n{table(parts)}")
    output = args.output or (None if args.dry else ROOT / "docs" / "gpu")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{safe_name(where['card'])}-{date.today().isoformat()}-tests.json"
        found = {
            "dry": args.dry,
            "date": date.today().isoformat(),
            "machine": where,
            "parts": [asdict(p) for p in parts],
        }
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path)
    return exit_code(parts, dry=args.dry)


if __name__ == "__main__":
    raise SystemExit(main())
