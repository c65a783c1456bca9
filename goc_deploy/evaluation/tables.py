"""Numbers of an evaluation as a table for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from goc_deploy.show import Table

SIGNIFICANT = 6


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown.

    Attributes:
        key: in the JSON.
        title: column.
        digits: after the point, fewer where the number is large.
        paired: compares image by image, not sets of images.
        lower_is_better: which end is good.
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


def shown_metrics(found: dict[str, Any]) -> list[Metric]:
    """The metrics that at least one plan has."""
    return [metric for metric in METRICS if any(metric.key in plan["metrics"] for plan in found["plans"].values())]


def shown_value(estimate: dict[str, float] | None, metric: Metric, plus_minus: str = "+-") -> str:
    """A number with half of its interval, or nothing."""
    if estimate is None:
        return ""
    value, half = estimate["value"], (estimate["high"] - estimate["low"]) / 2
    digits = min(metric.digits, max(0, SIGNIFICANT - 1 - math.floor(math.log10(abs(value) or 1))))
    return f"{value:.{digits}f}" + (f" {plus_minus}{half:.{digits}f}" if half else "")


def cost_rows(found: dict[str, Any]) -> Table:
    """A row per plan: what it costs and how near its baseline it stays."""
    metrics = [metric for metric in shown_metrics(found) if metric.paired]
    rows = []
    for name, plan in found["plans"].items():
        ms = "" if plan["ms_per_image"] is None else f"{plan['ms_per_image']:.1f}"
        cost = [str(plan["steps"]), f"{plan['full_step_equivalents']:.2f}", ms]
        rows.append([name, *cost, *_values(plan, metrics)])
    return ["plan", "steps", "full steps", "ms/image", *(metric.title for metric in metrics)], rows


def distribution_rows(found: dict[str, Any]) -> Table:
    """A row per plan: how its images compare as a set; no rows where nothing was measured."""
    metrics = [metric for metric in shown_metrics(found) if not metric.paired]
    rows = [[name, *_values(plan, metrics)] for name, plan in found["plans"].items() if metrics]
    return ["plan", *(metric.title for metric in metrics)], rows


def _values(plan: dict[str, Any], metrics: list[Metric]) -> list[str]:
    return [shown_value(plan["metrics"].get(metric.key), metric) for metric in metrics]
