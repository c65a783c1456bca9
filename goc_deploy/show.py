"""Plans as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from goc_deploy.manifest import Manifest
from goc_deploy.plan import Plan
from goc_deploy.spec import ITEM_BYTES

Table = tuple[list[str], list[list[str]]]


def plan_rows(plans: Sequence[Plan], manifest: Manifest) -> Table:
    """A row per plan: what it computes and what its cache takes for one guided image."""
    columns = [
        "plan",
        "SPEC",
        "sampler",
        "steps",
        "full",
        "mixed",
        "collapsed",
        "computed",
        "cache MB/image",
        "naive MB/image",
    ]
    spec, item = manifest.model, ITEM_BYTES[manifest.precision]
    rows = []
    for plan in plans:
        kinds = [str(plan.kind_counts.get(kind, 0)) for kind in ("full", "mixed", "collapsed")]
        share = f"{100 * plan.schedule.computed / (plan.steps * spec.units):.1f} %"
        megabytes = [f"{b / 1e6:.2f}" for b in (plan.cache_bytes(spec, 2, item), plan.naive_cache_bytes(spec, 2, item))]
        rows.append([plan.name, plan.schedule.policy, plan.sampler.sampler, str(plan.steps), *kinds, share, *megabytes])
    return columns, rows


def action_rows(plan: Plan) -> Table:
    """A row per step: timestep, kind, how many units do what, and with which coefficients."""
    schedule = plan.schedule
    rows = []
    for step, units in enumerate(schedule.coefficients):
        counts = Counter(schedule.action(step, unit) for unit in range(schedule.units))
        actions = ", ".join(f"{count} {action}" for action, count in sorted(counts.items()))
        used = sorted({row for row in units if row})
        shown = "; ".join(" ".join(f"{c:+g}" for c in row) for row in used[:3]) + (
            f"; {len(used) - 3} more" if len(used) > 3 else ""
        )
        rows.append([str(step), str(plan.sampler.timesteps[step]), plan.step_kind(step), actions, shown])
    return ["step", "timestep", "kind", "units", "coefficients, newest first"], rows
