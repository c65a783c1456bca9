"""Draw the README's plot: the error of plans against their time, from numbers of docs/results.

    python benchmarks/error_time.py docs/results docs/images/error-time.png

The error is the relative L2 distance of the final images to those without cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from benchmarks.results import TIMES

METRIC, UNCACHED = "relative_l2", "none.T20"
COLORS = {"plain reuse (FORA)": "#8295a8", "GOC": "#f2a541"}
POINTS = {
    "plain reuse (FORA)": ("fora-2@0.5", "fora-2", "fora-3", "fora-4"),
    "GOC": ("fora-2@0.5+goc", "fora-2+goc", "fora-3+goc", "fora-4+goc"),
}
COMPUTED = ("15 of 20\nsteps computed", "10", "7", "5")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=Path, help="folder that benchmarks/results.py wrote")
    parser.add_argument("output", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    times = json.loads((args.numbers / TIMES).read_text(encoding="utf-8"))["total_ms"]
    figure = Figure(figsize=(5.53, 4), layout="constrained")
    axes = figure.subplots()
    for title, names in POINTS.items():
        shares = [100 * times[f"{name}.T20"] / times[UNCACHED] for name in names]
        errors = [_error(args.numbers, f"{name}.T20") for name in names]
        axes.plot(shares, errors, "o-", color=COLORS[title], label=title, linewidth=2)
        if title == "plain reuse (FORA)":
            for share, error, computed in zip(shares, errors, COMPUTED, strict=True):
                below = computed == "7"
                axes.annotate(
                    computed,
                    (share, error),
                    (-12, -14) if below else (6, 5),
                    textcoords="offset points",
                    color="#656d76",
                )
    axes.set(
        xlabel="time, % of the time without cache",
        ylabel="error (relative L2 to no cache)",
        xlim=(20, 100),
        ylim=(0, 0.15),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eaeef2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(args.output, dpi=160)
    print(args.output)
    return 0


def _error(numbers: Path, name: str) -> float:
    row = json.loads((numbers / f"{name}.json").read_text(encoding="utf-8"))
    return float(row["metrics"][METRIC]["value"])


if __name__ == "__main__":
    raise SystemExit(main())
