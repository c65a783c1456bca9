"""An evaluation as one HTML file, without network access or scripts, in light and dark mode."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from goc_deploy.display.heat_map import heat_map, svg
from goc_deploy.evaluation.charts import Point, Series, chart, color_of
from goc_deploy.evaluation.evaluate import Evaluation
from goc_deploy.evaluation.tables import (
    Metric,
    costs,
    name_columns,
    named,
    shown_metrics,
    shown_value,
)

PICTURE_SIDE = 64  # smallest side in pixels

MEANINGS = {
    "relative_l2": "distance of the final latents to those of the baseline, over the size of the "
    "baseline's; mean over images",
    "converged_relative_l2": "the same distance to a solution of very many uncached steps",
    "psnr_db": "peak signal-to-noise ratio of the images to the baseline's",
    "ssim": "structural similarity of the images to the baseline's",
    "fid": "Frechet distance of the features to the reference's",
    "sfid": "Frechet distance of spatial activations to the reference's",
    "kid": "kernel distance of the features to the reference's, unbiased for few images",
    "inception_score": "how sure the classifier is of each image, and how even its classes are",
    "precision": "share of images within the reference's manifold",
    "recall": "share of reference images within the samples' manifold",
    "agreement": "share of images in which the classifier reads the label they were made for",
}


def page(evaluation: Evaluation, engine: str) -> str:
    """Write the report as HTML.

    Args:
        evaluation: the evaluation to show.
        engine: name of the engine directory.
    """
    report = evaluation.report
    plans: dict[str, Any] = report["plans"]
    color = {name: i for i, name in enumerate(plans)}
    style = files("goc_deploy.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{escape(engine)}: plans against no cache</h1>",
        f'<p class="soft">{_subtitle(report)}</p>',
        *(f'<p class="warn">{escape(warning)}</p>' for warning in report["warnings"]),
        "<h2>Quality and cost</h2>",
        _tables(report, color),
        '<p class="soft">&plusmn; is half of a 95 % interval; the best plan that caches is marked '
        "if its interval overlaps that of no other. Full steps are computed units over units per "
        "step, the caching level is the share of units that are not computed, FLOPs are of one "
        "image, two per multiply-add. Milliseconds and speed-ups are medians "
        "of this run, which is no benchmark.</p>",
        *_section("Quality against compute", _frontier(report, color)),
        *_section("Error over steps", _steps(report, color)),
        "<h2>Schedules</h2>",
        f'<div class="row">{"".join(_schedule(name, evaluation, color) for name in plans)}</div>',
        *_section("The same noise, plan by plan", _pictures(evaluation, color)),
        "<h2>What the numbers mean</h2>",
        _definitions(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(engine)}: evaluation</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{title}</h2>", content] if content else []


def _subtitle(report: dict[str, Any]) -> str:
    options = report["options"]
    parts = [
        f"{report['images']} images per plan",
        f"guidance {options['cfg_scale']:g} on {options['cfg_channels']} channels",
        f"seed {options['seed']}, {options['labels']} labels",
        f"{report['precision']}",
        " ".join(
            str(value)
            for key, value in report["machine"].items()
            if key in ("backend", "version", "read_from")
        ),
    ]
    if report["features"]:
        parts.append(f"features of {report['features']}, {report['resamples']} resamples")
    if options["reference"]:
        parts.append(f"reference {options['reference']}")
    return escape("; ".join(parts))


def _key(number: int) -> str:
    color, hollow = color_of(number)
    return f'<span class="key {"hollow" if hollow else "solid"}" style="color:{color}"></span>'


def _tables(report: dict[str, Any], color: dict[str, int]) -> str:
    """Write a table of cost and paired metrics, and a table of the metrics of sets of images."""
    metrics = shown_metrics(report)
    tables = [_table(report, color, [m for m in metrics if m.paired], with_cost=True)]
    if any(not m.paired for m in metrics):
        tables.append(_table(report, color, [m for m in metrics if not m.paired], with_cost=False))
    return "".join(f'<div class="scroll">{table}</div>' for table in tables)


def _table(
    report: dict[str, Any], color: dict[str, int], metrics: Sequence[Metric], *, with_cost: bool
) -> str:
    columns, cost = costs(report)
    titles = [*name_columns(report), *(columns if with_cost else []), *(m.title for m in metrics)]
    best = {metric.key: _best(report, metric) for metric in metrics}
    lines = []
    for name, (first, *more) in named(report).items():
        plan = report["plans"][name]
        cells = [f"<td>{_key(color[name])}{escape(first)}</td>"]
        cells += [
            f"<td>{escape(cell)}</td>" for cell in (*more, *(cost[name] if with_cost else ()))
        ]
        for metric in metrics:
            value, _, half = shown_value(plan["metrics"].get(metric.key), metric, "|").partition(
                " |"
            )
            mark = ' class="best"' if best[metric.key] == name else ""
            cells.append(
                f"<td{mark}>{value}{f' <small>&plusmn;{half}</small>' if half else ''}</td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _best(report: dict[str, Any], metric: Metric) -> str | None:
    """Return the best plan that caches, if its interval overlaps that of no other such plan.

    Values without an interval have no best plan, because their noise is unknown.
    """
    ranked = sorted(
        (
            (plan["metrics"][metric.key], name)
            for name, plan in report["plans"].items()
            if metric.key in plan["metrics"] and plan["computed_units"] < plan["all_units"]
        ),
        key=lambda entry: (
            entry[0]["value"] if metric.lower_is_better else -entry[0]["value"],
            entry[1],
        ),
    )
    if len(ranked) < 2 or any(estimate["low"] == estimate["high"] for estimate, _ in ranked):
        return None
    (best, name), *others = ranked
    if metric.lower_is_better:
        apart = best["high"] < min(other["low"] for other, _ in others)
    else:
        apart = best["low"] > max(other["high"] for other, _ in others)
    return name if apart else None


def _frontier(report: dict[str, Any], color: dict[str, int]) -> str:
    """Draw every distance over full steps, and over milliseconds if they were measured."""
    charts = []
    for metric in (
        m for m in shown_metrics(report) if m.key in ("relative_l2", "converged_relative_l2", "fid")
    ):
        for cost, title in (
            ("full_step_equivalents", "full steps"),
            ("ms_per_image", "ms per image"),
        ):
            series = []
            for name, plan in report["plans"].items():
                estimate = plan["metrics"].get(metric.key, {"value": 0})
                if plan[cost] and estimate["value"] > 0:
                    point = Point(plan[cost], estimate["value"], estimate["low"], estimate["high"])
                    series.append(Series(name, color[name], (point,)))
            if len(series) > 1:
                charts.append(f'<div class="panel">{chart(series, title, metric.title)}</div>')
    return f'{_legend(color)}<div class="row">{"".join(charts)}</div>' if charts else ""


def _steps(report: dict[str, Any], color: dict[str, int]) -> str:
    series = []
    for name, plan in report["plans"].items():
        errors = enumerate(plan["step_errors"] or [])
        points = tuple(Point(float(k), error, error, error) for k, error in errors if error > 0)
        if points:
            series.append(Series(name, color[name], points))
    if not series:
        return ""
    svg = chart(series, "step (0 is the noisiest)", "relative L2 after the step", lines=True)
    images = min(report["images"], report["options"]["trajectory_images"])
    return (
        f'{_legend({s.name: s.color for s in series})}<div class="row"><div class="panel">{svg}'
        "</div></div>"
        f'<p class="soft">Mean over the first {images} images.</p>'
    )


def _legend(color: dict[str, int]) -> str:
    entries = "".join(f"<span>{_key(i)}{escape(name)}</span>" for name, i in color.items())
    return f'<div class="legend">{entries}</div>'


def _schedule(name: str, evaluation: Evaluation, color: dict[str, int]) -> str:
    drawing = svg(heat_map(evaluation.schedules[name]))
    return f'<div class="panel"><h3>{_key(color[name])}{escape(name)}</h3>{drawing}</div>'


def _pictures(evaluation: Evaluation, color: dict[str, int]) -> str:
    if not evaluation.pictures:
        return ""
    rows = (
        f"<div>{_key(color[name])}{escape(name)}</div><div>{_strip(images)}</div>"
        for name, images in evaluation.pictures.items()
    )
    return f'<div class="pictures">{"".join(rows)}</div>'


def _strip(images: np.ndarray) -> str:
    """Write pictures in one row, as a PNG in the page."""
    from goc_deploy.runtime.images import grid

    scale = max(1, -(-PICTURE_SIDE // images.shape[1]))
    content = io.BytesIO()
    picture = grid(images, len(images), scale=1, gap=0)
    picture.save(content, "PNG", optimize=True)
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return (
        f'<img width="{picture.width * scale}" alt="{len(images)} pictures" '
        f'src="data:image/png;base64,{encoded}">'
    )


def _definitions(report: dict[str, Any]) -> str:
    metrics: Sequence[Metric] = shown_metrics(report)
    lines = [
        f"<dt>{escape(metric.title)}</dt><dd>{escape(MEANINGS[metric.key])}</dd>"
        for metric in metrics
    ]
    non_default = {
        key: value for key, value in report["options"].items() if value not in (None, 0, "", [], ())
    }
    shown = {
        key: ", ".join(value) if isinstance(value, (list, tuple)) else value
        for key, value in non_default.items()
    }
    options = "; ".join(f"{key} {value}" for key, value in shown.items())
    lines.append(f"<dt>options</dt><dd>{escape(options)}</dd>")
    lines.append(f"<dt>goc_deploy</dt><dd>{escape(report['goc_deploy'])}</dd>")
    return f"<dl>{''.join(lines)}</dl>"
