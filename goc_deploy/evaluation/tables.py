"""Numbers of an evaluation as a table for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from goc_deploy.display.plans import Table

SIGNIFICANT = 6


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown.

    Attributes:
        key: key in the JSON file.
        title: title of the column.
        digits: digits after the point; large numbers have fewer.
        paired: True if it compares image by image, False if it compares sets of images.
        lower_is_better: True if small values are good.
    """

    key: str
    title: str
    digits: int
    paired: bool = False
    lower_is_better: bool = True


METRICS = (
    Metric("relative_l2", "relative L2", 4, paired=True),
    Metric("converged_relative_l2", "L2 to converged", 4, paired=True),
    Metric("psnr_db", "PSNR dB", 2, paired=True, lower_is_better=False),
    Metric("ssim", "SSIM", 4, paired=True, lower_is_better=False),
    Metric("fid", "FID", 3),
    Metric("sfid", "sFID", 3),
    Metric("kid", "KID", 5),
    Metric("inception_score", "IS", 3, lower_is_better=False),
    Metric("precision", "precision", 3, lower_is_better=False),
    Metric("recall", "recall", 3, lower_is_better=False),
    Metric("agreement", "agreement", 4, lower_is_better=False),
)


def shown_metrics(report: dict[str, Any]) -> list[Metric]:
    """Return the metrics that at least one plan has."""
    return [
        metric
        for metric in METRICS
        if any(metric.key in plan["metrics"] for plan in report["plans"].values())
    ]


def shown_value(estimate: dict[str, float] | None, metric: Metric, plus_minus: str = "+-") -> str:
    """Format a number with half of its interval; None is an empty text."""
    if estimate is None:
        return ""
    value, half = estimate["value"], (estimate["high"] - estimate["low"]) / 2
    digits = min(metric.digits, max(0, SIGNIFICANT - 1 - math.floor(math.log10(abs(value) or 1))))
    return f"{value:.{digits}f}" + (f" {plus_minus}{half:.{digits}f}" if half else "")


def named(report: dict[str, Any]) -> dict[str, list[str]]:
    """Map each plan to the cells of its name: in a preset the method, then the name."""
    methods = {name: plan.get("method") for name, plan in report["plans"].items()}
    return {name: [method, name] if method else [name] for name, method in methods.items()}


def costs(report: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns of a plan's cost, and plan -> its cells.

    A preset has the columns of papers, any other evaluation what was counted and measured.
    """
    plans: dict[str, Any] = report["plans"]
    if not _of_preset(report):
        cells = {
            name: [str(plan["steps"]), f"{plan['full_step_equivalents']:.2f}", _ms(plan)]
            for name, plan in plans.items()
        }
        return ["steps", "full steps", "ms/image"], cells
    cells = {}
    for name, plan in plans.items():
        cached = 100 * (1 - plan["computed_units"] / plan["all_units"])
        own, baseline = plan["ms_per_image"], plans[plan["baseline"]]["ms_per_image"]
        speed_up = "" if own is None else f"{baseline / own:.2f}"
        cells[name] = [f"{cached:.1f}", f"{plan['flops_per_image'] / 1e12:.3g}", speed_up]
    return ["caching level %", "FLOPs (T)", "speed-up"], cells


def cost_rows(report: dict[str, Any]) -> Table:
    """Make a row per plan: its cost, and its distance to the baseline."""
    metrics = [metric for metric in shown_metrics(report) if metric.paired]
    columns, cells = costs(report)
    titles = [*name_columns(report), *columns, *(metric.title for metric in metrics)]
    names = named(report)
    return titles, [
        [*names[name], *cells[name], *_values(plan, metrics)]
        for name, plan in report["plans"].items()
    ]


def distribution_rows(report: dict[str, Any]) -> Table:
    """Make a row per plan: its metrics as a set of images; no rows if there are none."""
    metrics = [metric for metric in shown_metrics(report) if not metric.paired]
    names = named(report)
    rows = [
        [*names[name], *_values(plan, metrics)] for name, plan in report["plans"].items() if metrics
    ]
    return [*name_columns(report), *(metric.title for metric in metrics)], rows


def name_columns(report: dict[str, Any]) -> list[str]:
    """Return the titles of the cells of `named`."""
    return ["method", "plan"] if _of_preset(report) else ["plan"]


def _of_preset(report: dict[str, Any]) -> bool:
    return any(plan.get("method") for plan in report["plans"].values())


def _ms(plan: dict[str, Any]) -> str:
    return "" if plan["ms_per_image"] is None else f"{plan['ms_per_image']:.1f}"


def _values(plan: dict[str, Any], metrics: list[Metric]) -> list[str]:
    return [shown_value(plan["metrics"].get(metric.key), metric) for metric in metrics]
