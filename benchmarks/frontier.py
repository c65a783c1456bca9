"""Draw the rows of benchmarks/frontier.toml: distance against compute and against time.

The distance is the one to the converged solution.

    python benchmarks/results.py engine --reference digits.npz \\
        --rows benchmarks/frontier.toml --images 256 --work out/frontier \\
        --numbers docs/results/frontier --document docs/results.md
    python benchmarks/frontier.py docs/results/frontier
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.results import TIMES
from goc_deploy.policies.grammar import parse_policy

METRIC = "converged_relative_l2"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=Path, help="folder that benchmarks/results.py wrote")
    args = parser.parse_args(argv)
    rows = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(args.numbers.glob("*.json"))
    }
    times = rows.pop(Path(TIMES).stem, {"total_ms": {}, "images": 1})
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    by_compute, by_time = figure.subplots(1, 2, sharey=True)
    for series, members in series_of(rows).items():
        errors = [rows[name]["metrics"][METRIC]["value"] for name in members]
        line = "o-" if len(members) > 1 else "s"
        by_compute.plot(
            [rows[name]["full_step_equivalents"] for name in members], errors, line, label=series
        )
        clocked = [
            (times["total_ms"][n] / times["images"], e)
            for n, e in zip(members, errors, strict=True)
            if n in times["total_ms"]
        ]
        by_time.plot(
            *zip(*sorted(clocked), strict=True) if clocked else ([], []), line, label=series
        )
    by_compute.set(
        xlabel="full steps computed",
        ylabel="relative L2 to the converged solution",
        xscale="log",
        yscale="log",
    )
    by_time.set(xlabel="ms per image", xscale="log")
    for axis in (by_compute.xaxis, by_compute.yaxis, by_time.xaxis):
        label_round_numbers(axis)
    handles, titles = by_compute.get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(args.numbers.with_suffix(".png"), dpi=120)
    print(args.numbers.with_suffix(".png"))
    return 0


def label_round_numbers(axis: Axis) -> None:
    """Labels at 1, 2 and 5 times powers of ten of a logarithmic axis.

    The labels of every tick overlap if the axis has less than two decades.
    """
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def series_of(rows: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Line -> names of its rows by rising compute.

    The uncached, the searched and the head's rows make one line per sampler; every other SPEC has
    its own.
    """
    series: dict[str, list[str]] = {}
    for name, row in sorted(rows.items(), key=lambda item: item[1]["full_step_equivalents"]):
        policy = parse_policy(row["spec"])
        base, head = policy.base[0], policy.head is not None
        sampler = {"ddim": "DDIM", "dpm++": "DPM-Solver++"}.get(row["sampler"], row["sampler"])
        shown = {
            "none": f"{sampler}, no cache" + ", head" * head,
            "search": f"{sampler}, searched",
            "compute": f"{sampler}, computed steps only" + ", head" * head,
        }
        title = shown.get(base, f"{row['spec']}, {row['steps']} steps of {sampler}")
        series.setdefault(title, []).append(name)
    return series


if __name__ == "__main__":
    raise SystemExit(main())
