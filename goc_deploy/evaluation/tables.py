"""Numbers of an evaluation as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown.

    Attributes:
        key: in the JSON.
        title: column.
        digits: after the point.
        scale: what the number is multiplied by before it is shown.
        lower_is_better: which end is good.
    """

    key: str
    title: str
    digits: int
    scale: float = 1
    lower_is_better: bool = True


METRICS = (
    Metric("relative_l2", "rel. L2", 4),
    Metric("converged_relative_l2", "to converged", 4),
    Metric("psnr_db", "PSNR dB", 2, lower_is_better=False),
    Metric("ssim", "SSIM", 4, lower_is_better=False),
    Metric("fid", "FID", 3),
    Metric("sfid", "sFID", 3),
    Metric("kid", "KID x1000", 3, 1000),
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
    value, half = estimate["value"] * metric.scale, (estimate["high"] - estimate["low"]) / 2 * metric.scale
    return f"{value:.{metric.digits}f}" + (f" {plus_minus}{half:.{metric.digits}f}" if half else "")


def metric_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per plan: cost, then every metric that was measured."""
    metrics = shown_metrics(found)
    columns = ["plan", "steps", "full steps", "ms/image", *(metric.title for metric in metrics)]
    rows = []
    for name, plan in found["plans"].items():
        cost = [
            str(plan["steps"]),
            f"{plan['full_step_equivalents']:.2f}",
            "" if plan["ms_per_image"] is None else f"{plan['ms_per_image']:.1f}",
        ]
        rows.append([name, *cost, *(shown_value(plan["metrics"].get(m.key), m) for m in metrics)])
    return columns, rows
