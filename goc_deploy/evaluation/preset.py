"""Presets: the rows of a table of the literature, for any engine directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.options import PRESETS, EvalOptions, Progress
from goc_deploy.policies.grammar import parse_policy

PAPER_BASES = (("FORA-50", "fora:2"), ("FORA-25", "fora:2@0.5"))


def plans_of_preset(
    directory: EngineDir, options: EvalOptions, progress: Progress
) -> dict[str, str]:
    """Return the plans of a preset; those that the engine directory lacks are added to it.

    ``paper`` has the rows of Table 1 of GOC's paper: no cache, FORA at 50 and 25 percent, and
    Learning-to-Cache if ``options.router`` is its file. Each base also has a row with the gradient
    at every step (GC) and a row with the gradient at the steps that GOD chooses (GOC). GOC chooses
    its strength on calibration images. GC has the same strength, so that the two rows differ by GOD
    alone.

    Returns:
        Plan name -> method.

    Raises:
        UsageError: the preset is unknown, or a plan of the engine directory has other steps or
            another sampler than no cache.
        GocError: a plan cannot be added, as in `goc_deploy.add_plan`.
    """
    if options.preset not in PRESETS:
        raise UsageError(f"preset {options.preset!r} is not one of {', '.join(PRESETS)}")
    if options.plans:
        raise UsageError("a preset chooses the plans; leave out the plans or the preset")
    plan_of = _plan_finder(directory, options, progress)
    uncached = plan_of("none")
    methods = {uncached.name: "no cache"}
    bases = (*PAPER_BASES, *((("L2C", f"l2c:{options.router}"),) if options.router else ()))
    for method, base in bases:
        plain, learned = plan_of(base), plan_of(f"{base}+goc")
        everywhere = plan_of(f"{base}+gc:{_eta(learned)}")
        for other in (everywhere, learned):
            _check_computes_the_same(other, plain)
        rows = ((plain, method), (everywhere, f"{method} + GC"), (learned, f"{method} + GOC"))
        methods |= {plan.name: title for plan, title in rows}
    return methods


def _plan_finder(
    directory: EngineDir, options: EvalOptions, progress: Progress
) -> Callable[[str], Plan]:
    """Return a function from SPEC to plan.

    It adds a missing plan with the steps and the sampler of the first plan that was asked for.
    """
    from goc_deploy.api.facade import add_plan
    from goc_deploy.engines.ort import shared_pool_of_process

    first: list[Plan] = []

    def plan_of(spec: str) -> Plan:
        nonlocal directory
        plans, wanted = directory.manifest.plans, {spec, parse_policy(spec).default_name}
        entry = next((entry for entry in plans if wanted & {entry.name, entry.policy}), None)
        # A plan may be of another router file of the same name; then adding the plan fails.
        if entry is None or spec == f"l2c:{options.router}":
            if options.threads:
                # The pool keeps its first size, and add_plan asks for every core.
                shared_pool_of_process(options.threads)
            like: dict[str, Any] = (
                {"steps": first[0].steps, "sampler": first[0].sampler.sampler} if first else {}
            )
            entry = add_plan(
                directory.path, spec, progress=progress, cfg_scale=options.cfg_scale, **like
            )
            directory = EngineDir.open(directory.path)
        plan = directory.plan(entry.name)
        first.append(plan)
        if (plan.steps, plan.sampler.sampler) != (first[0].steps, first[0].sampler.sampler):
            raise UsageError(
                f"plan {plan.name} has {plan.steps} steps of {plan.sampler.sampler}, but "
                f"{first[0].name} has {first[0].steps} of {first[0].sampler.sampler}; a preset "
                "compares plans of one step count and sampler, so use another engine directory"
            )
        return plan

    return plan_of


def _check_computes_the_same(plan: Plan, plain: Plan) -> None:
    """Check that a corrected plan, which may be older, has the base that it is shown with."""
    computed = [
        [[not row for row in step] for step in p.schedule.coefficients] for p in (plan, plain)
    ]
    if computed[0] != computed[1]:
        raise UsageError(
            f"plan {plan.name} computes other units than {plain.name}, so it was made from another "
            "base; use another engine directory"
        )


def _eta(plan: Plan) -> float:
    """Return the strength that GOC chose."""
    god = plan.schedule.provenance.get("god")
    eta = god.get("eta") if isinstance(god, dict) else None
    if not isinstance(eta, (int, float)):
        raise UsageError(
            f"plan {plan.name} does not tell its eta; make it again with goc-plan and the SPEC of "
            "its name"
        )
    return float(eta)
