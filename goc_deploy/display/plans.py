"""Plans as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from goc_deploy.compiler import Plan, in_form
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.precision import ITEM_BYTES
from goc_deploy.samplers.head_features import head_weights
from goc_deploy.schedule import Schedule

Table = tuple[list[str], list[list[str]]]

PREDICTION_NAMES = {
    "gc": "gradient",
    "steps": "gradient",
    "goc": "gradient",
    "taylor": "Taylor",
    "lagrange": "Lagrange",
    "hermite": "Hermite",
    "fit": "fitted",
}


def plan_rows(plans: Sequence[Plan], manifest: Manifest) -> Table:
    """Make a row per plan: its computed units, and its cache for one guided image."""
    columns = [
        "plan",
        "SPEC",
        "sampler",
        "steps",
        "full",
        "mixed",
        "collapsed",
        "computed",
        "segments",
        "cache MB/image",
        "naive MB/image",
    ]
    spec, item = manifest.model, ITEM_BYTES[manifest.precision]
    rows = []
    for plan in plans:
        kinds = [str(plan.kind_counts.get(kind, 0)) for kind in ("full", "mixed", "collapsed")]
        share = f"{100 * plan.schedule.computed / (plan.steps * spec.units):.1f} %"
        megabytes = [
            f"{b / 1e6:.2f}"
            for b in (plan.cache_bytes(spec, 2, item), plan.naive_cache_bytes(spec, 2, item))
        ]
        rows.append(
            [
                plan.name,
                plan.schedule.policy,
                plan.sampler.sampler,
                str(plan.steps),
                *kinds,
                share,
                plan.segments,
                *megabytes,
            ]
        )
    return columns, rows


def history_rows(plans: Sequence[Plan], manifest: Manifest) -> Table:
    """Make a row per plan: the cache of one guided image in every form of the plan."""
    spec, item = manifest.model, ITEM_BYTES[manifest.precision]
    rows = []
    for plan in plans:
        cells = [f"{plan.naive_cache_bytes(spec, 2, item) / 1e6:.2f}"]
        for form in get_args(PlanForm):
            try:
                size = in_form(plan, spec, form).cache_bytes(spec, 2, item)
            except UsageError:
                cells.append("no such form")
            else:
                cells.append(f"{size / 1e6:.2f}")
        rows.append([plan.name, *cells])
    return ["plan", "naive MB/image", *(f"{form} MB" for form in get_args(PlanForm))], rows


def head_rows(plans: Sequence[Plan]) -> Table:
    """Make a row per plan with a head: what it reads, its size, and where it was fitted."""
    rows = []
    for plan in plans:
        head = plan.sampler.head
        if head is None:
            continue
        steps, width, values = head.shape
        weights = head_weights(head)
        low, high = head.cfg_scales
        rows.append(
            [
                plan.name,
                head.form.signature,
                f"{width} x {values}",
                f"{weights.any(axis=(1, 2)).sum()} of {steps}",
                str(int((weights != 0).sum())),
                f"{len(head.weights) / 1e3:.1f}",
                f"{low:g}" if low == high else f"{low:g} to {high:g}",
            ]
        )
    columns = [
        "plan",
        "head",
        "weights of a step",
        "steps with a head",
        "numbers learned",
        "kB",
        "fitted for guidance",
    ]
    return columns, rows


def action_rows(plan: Plan) -> Table:
    """Make a row per step: timestep, kind, actions with their coefficients, and GOD's N and B."""
    schedule = plan.schedule
    prediction = prediction_name(schedule)
    judged = god_curves(schedule)
    rows = []
    for step, units in enumerate(schedule.coefficients):
        counts = Counter(
            action_name(schedule, step, unit, prediction) for unit in range(schedule.units)
        )
        actions = ", ".join(f"{count} {action}" for action, count in sorted(counts.items()))
        if schedule.level == "residual" and units[0]:
            actions = f"{action_name(schedule, step, 0, prediction)} of the residual"
        used = sorted({row for row in units if row})
        shown = "; ".join(" ".join(f"{c:+g}" for c in row) for row in used[:3]) + (
            f"; {len(used) - 3} more" if len(used) > 3 else ""
        )
        numbers = [f"{curve[step]:.2f}" for curve in judged]
        rows.append(
            [
                str(step),
                f"{plan.sampler.timesteps[step]:g}",
                plan.step_kind(step),
                *numbers,
                actions,
                shown,
            ]
        )
    columns = ["N inverse", "B"] if judged else []
    return ["step", "timestep", "kind", *columns, "units", "coefficients, newest first"], rows


def action_name(schedule: Schedule, step: int, unit: int, prediction: str) -> str:
    """Return ``compute``, ``reuse``, or ``prediction``, the schedule's `prediction_name`."""
    action = schedule.action(step, unit)
    return action if action in ("compute", "reuse") else prediction


def prediction_name(schedule: Schedule) -> str:
    """Name a schedule's predictions: the correction of its SPEC, or the one that a search chose.

    The coefficients are not enough: the gradient with eta 0.5 and the line through two features may
    have the same numbers.
    """
    try:
        policy = parse_policy(schedule.policy)
    except UsageError:  # a file may have any text there
        return "prediction"
    if policy.base[0] == "file":  # a file may contain predictions of its own
        return "prediction"
    search = schedule.provenance.get("search")
    correction = search.get("correction") if isinstance(search, dict) else None
    name = (
        policy.correction[0]
        if policy.correction
        else str(correction or "prediction").partition(":")[0]
    )
    return PREDICTION_NAMES.get(name, name)


def god_curves(schedule: Schedule) -> list[list[float]]:
    """Return N and B of every step from a schedule's provenance.

    The result is empty if GOD did not make the schedule, or if somebody edited the numbers.
    """
    god = schedule.provenance.get("god")
    curves = (
        [god.get(name) for name in ("inverse_share", "boundary")] if isinstance(god, dict) else []
    )
    fits = all(
        isinstance(curve, list)
        and len(curve) == schedule.steps
        and all(isinstance(v, (int, float)) for v in curve)
        for curve in curves
    )
    return [[float(v) for v in curve] for curve in curves if curve] if fits else []


def calibration_lines(schedule: Schedule) -> list[str]:
    """Make a line per calibrated part of a schedule: parameters, measurements, and images."""
    lines = []
    for part, statistics in sorted(schedule.provenance.items()):
        if not isinstance(statistics, dict):
            continue
        images = statistics.get("calibration", {})
        shown = {k: v for k, v in statistics.items() if isinstance(v, (bool, int, float, str))}
        on = (
            {k: v for k, v in images.items() if k != "checkpoint_sha256"}
            if isinstance(images, dict)
            else {}
        )
        words = [
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in {**shown, **on}.items()
        ]
        lines.append(f"{part}: {', '.join(words)}")
        lines += [
            f"  threshold {m['threshold']:.3f}: error {m['error']:.4f}"
            for m in statistics.get("measured", [])
            if isinstance(m, dict) and {"threshold", "error"} <= m.keys()
        ]
        lines += [
            f"  step {m['step']}: penalty {m['penalty']}, error of training images "
            f"{_change(m['train'])}, of held-out images {_change(m['held_out'])}"
            for m in statistics.get("by_step", [])
            if isinstance(m, dict) and {"step", "penalty", "train", "held_out"} <= m.keys()
        ]
        lines += [
            f"  {m['steps']} steps, computed {', '.join(map(str, m['computed']))}, "
            f"{m['features']}: error {m['error']:.4f}"
            for m in statistics.get("tried", [])
            if isinstance(m, dict) and {"steps", "computed", "features", "error"} <= m.keys()
        ]
    return lines


def _change(errors: object) -> str:
    """Two errors, before and after a fit."""
    if not isinstance(errors, list) or not all(isinstance(e, (int, float)) for e in errors):
        return str(errors)
    return " to ".join(f"{error:.4f}" for error in errors)
