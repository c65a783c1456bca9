"""Plots (need the ``plot`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.outputs import written
from goc_deploy.schedule import Schedule
from goc_deploy.show import god_curves

ACTIONS = {"compute": "#1b3a57", "reuse": "#d9e4ec", "gradient": "#f2a541", "blend": "#8e5ea2"}


def pyplot() -> Any:
    """matplotlib.pyplot without a screen.

    Raises:
        EnvironmentUnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as cause:
        raise EnvironmentUnsupportedError("plots need matplotlib; run: pip install 'goc_deploy[plot]'") from cause
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_schedule(schedule: Schedule, title: str, path: Path) -> None:
    """Heat map of actions: steps from left to right, units from bottom to top; above it GOD's N and B where it chose."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(ACTIONS)
    codes = [[names.index(schedule.action(k, u)) for k in range(schedule.steps)] for u in range(schedule.units)]
    width, height = max(6.0, 1.5 + 0.28 * schedule.steps), max(3.0, 1.5 + 0.12 * schedule.units)
    curves = god_curves(schedule)
    panels = {"nrows": 2, "sharex": True, "height_ratios": [1, 2]} if curves else {}
    figure, found = plt.subplots(
        figsize=(min(width, 24), min(height + 1.5 * bool(curves), 16)), layout="constrained", **panels
    )
    axes = found[-1] if curves else found
    if curves:
        _plot_god(found[0], schedule, curves)
    axes.pcolormesh(
        codes,
        cmap=ListedColormap(list(ACTIONS.values())),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        edgecolors="white",
        linewidth=0.4,
    )
    branches = len(schedule.branches)
    axes.set_yticks(
        [branches * b + branches / 2 for b in range(schedule.depth)], [str(b) for b in range(schedule.depth)]
    )
    axes.set_xticks(
        [k + 0.5 for k in range(0, schedule.steps, max(1, schedule.steps // 20))],
        range(0, schedule.steps, max(1, schedule.steps // 20)),
    )
    axes.set_xlabel("step (0 is the noisiest)")
    axes.set_ylabel(f"block (rows from below: {', '.join(schedule.branches)})")
    figure.suptitle(title)
    present = sorted({code for row in codes for code in row})
    handles = [Patch(facecolor=ACTIONS[names[code]], edgecolor="grey", label=names[code]) for code in present]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _plot_god(axes: Any, schedule: Schedule, curves: list[list[float]]) -> None:
    """N, B and the threshold over steps."""
    middles = [step + 0.5 for step in range(schedule.steps)]
    axes.step(middles, curves[0], where="mid", color="#b23a48", label="N, share of inverse units")
    axes.plot(middles, curves[1], color="#1b3a57", marker="o", markersize=3, label="B, boundary")
    threshold = schedule.provenance["god"].get("threshold")
    if isinstance(threshold, (int, float)) and threshold <= 1:
        axes.axhline(threshold, color="grey", linestyle="--", label="threshold")
    axes.set_ylim(-0.05, 1.05)
    axes.legend(loc="upper left", fontsize="small", frameon=False)


def plot_step_times(rows: Sequence[tuple[str, Sequence[float]]], title: str, path: Path) -> None:
    """Median milliseconds of every step, one line per plan."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, milliseconds in rows:
        axes.plot(range(len(milliseconds)), milliseconds, marker="o", markersize=3, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("median time of the step (ms)")
    axes.set_yscale("log")  # a step that computes nothing takes a thousandth of a full one
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
