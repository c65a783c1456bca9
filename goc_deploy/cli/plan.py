"""goc-plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import print_table, run_command
from goc_deploy.cli.engine_options import (
    build_engines_and_tell,
    engine_options,
    engines_from_options,
)
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    cfg_scale_option,
    debug_option,
    output_option,
    plans_of_directory,
    sort_outputs,
    steps_option,
    verbose_option,
    version_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.compiler.plan import SEGMENTS
from goc_deploy.options import PlanOptions
from goc_deploy.policies.help import calibrated, policy_help
from goc_deploy.samplers import SAMPLER_GRAMMAR

DEFAULTS = PlanOptions()
EPILOG = (
    "Examples: goc-plan engine fora:3+gc:1.0 --steps 50 --name fast; goc-plan engine --list; "
    "goc-plan engine --show fast --plot fast.png; goc-plan engine --backend tensorrt-rtx --compute-capability 8.9.\n\n"
    f"{policy_help()}"
)


@click.command("goc-plan", context_settings=SETTINGS, epilog=EPILOG)
@click.argument("engine_dir", type=PATH)
@click.argument("spec", required=False)
@click.option("--name", help="Name of the new plan.  [default: SPEC made file-safe]")
@steps_option(None, "Sampling steps.  [default: those of the engine's first plan]")
@click.option("--sampler", help=f"{SAMPLER_GRAMMAR}.  [default: that of the engine's first plan]")
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    metavar="K",
    help=f"Images that a calibrated policy ({calibrated()}) learns from.  [default: 16, fewer for large models]",
)
@click.option("--seed", type=int, help=f"Seed of these images.  [default: {DEFAULTS.seed}]")
@cfg_scale_option(None, f"Guidance scale of these images.  [default: {DEFAULTS.cfg_scale:g}]")
@click.option(
    "--segments",
    type=click.Choice(SEGMENTS),
    help=f"What TensorRT runs as one engine: a full step, or no more than a unit.  [default: {DEFAULTS.segments}]",
)
@click.option("--list", "list_plans", is_flag=True, help="List the plans.")
@click.option(
    "--show",
    metavar="NAME",
    shell_complete=plans_of_directory,
    help="Show a plan's actions over steps.",
)
@output_option(
    "With --show, file to write, repeatable: .png, .svg or .pdf is --plot, .json is --smoothcache."
)
@click.option(
    "--plot",
    type=PATH,
    help="With --show, file for a heat map of actions over steps and units; it needs the plot extra.",
)
@click.option(
    "--smoothcache",
    type=PATH,
    metavar="FILE.json",
    help="With --show, file for what the plan computes, in the form of SmoothCache's schedules.",
)
@click.option(
    "--inspect", is_flag=True, help="Show the units, the engines, and what a step launches."
)
@engine_options
@verbose_option
@debug_option
@version_option
def command(
    engine_dir: Path,
    spec: str | None,
    name: str | None,
    steps: int | None,
    sampler: str | None,
    calibrate: int | None,
    seed: int | None,
    cfg_scale: float | None,
    segments: str | None,
    list_plans: bool,
    show: str | None,
    plot: Path | None,
    smoothcache: Path | None,
    inspect: bool,
    outputs: tuple[Path, ...],
    **engine_choices: Any,
) -> None:
    """Add the plan that SPEC names to ENGINE_DIR, list and show its plans, or build TensorRT engines for it."""
    engines, verify = engines_from_options(engine_choices)
    if sum((spec is not None, list_plans, show is not None, inspect, bool(engines))) != 1:
        raise click.UsageError(
            "give a SPEC to add, --list, --show NAME, --inspect, or a --backend to build engines for"
        )
    plot, smoothcache = sort_outputs(
        outputs, {(".png", ".svg", ".pdf"): plot, (".json",): smoothcache}
    )
    if (plot or smoothcache) and not show:
        raise click.UsageError("--plot and --smoothcache go with --show NAME")
    options: dict[str, Any] = {
        "name": name,
        "steps": steps,
        "sampler": sampler,
        "calibrate": calibrate,
        "seed": seed,
        "cfg_scale": cfg_scale,
        "segments": segments,
    }
    given = {option: value for option, value in options.items() if value is not None}
    if spec is None and given:
        raise click.UsageError(
            f"{', '.join('--' + option.replace('_', '-') for option in given)} goes with a SPEC"
        )
    if spec:
        from goc_deploy.api.facade import add_plan

        with progress_bar() as progress:
            entry = add_plan(engine_dir, spec, progress=progress, **given)
        _tell(engine_dir, entry.name)
        click.echo(entry.name)
        return
    if engines:
        build_engines_and_tell(engine_dir, engines, verify=verify)
        return
    if inspect:
        _inspect(engine_dir)
        return
    from goc_deploy.cli.paths import check_suffix, check_writable
    from goc_deploy.disk import written
    from goc_deploy.display.plans import action_rows, calibration_lines, plan_rows
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.policies.smoothcache import smoothcache_from_schedule

    check_suffix(plot, ".png", ".svg", ".pdf", what="--plot ends in .png, .svg or .pdf")
    check_suffix(smoothcache, ".json", what="--smoothcache ends in .json")
    check_writable(plot)
    check_writable(smoothcache)
    directory = EngineDir.open(engine_dir)
    if list_plans:
        columns, rows = plan_rows(directory.plans(), directory.manifest)
        print_table(str(engine_dir), columns, rows)
        return
    plan = directory.plan(show)
    columns, rows = action_rows(plan)
    print_table(
        f"{plan.name} ({plan.schedule.policy}), history {plan.schedule.history}, {plan.slots} cache slots",
        columns,
        rows,
    )
    for line in calibration_lines(plan.schedule):
        click.echo(line)
    if smoothcache:
        with written(smoothcache) as temporary:
            temporary.write_text(smoothcache_from_schedule(plan.schedule), encoding="utf-8")
        click.echo(smoothcache)
    if plot:
        from goc_deploy.display.plots import plot_schedule

        plot_schedule(plan.schedule, plan.name, plot)
        click.echo(plot)


def _tell(engine_dir: Path, name: str) -> None:
    """What a plan computes, on stderr."""
    from goc_deploy.engine_dir.directory import EngineDir

    plan = EngineDir.open(engine_dir).plan(name)
    schedule = plan.schedule
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.kind_counts.items())
    click.echo(
        f"{plan.schedule.policy}: {plan.steps} steps of {plan.sampler.sampler} ({kinds}), "
        f"{schedule.computed} of {plan.steps * schedule.units} units computed",
        err=True,
    )


def _inspect(engine_dir: Path) -> None:
    from goc_deploy.display.engines import engine_rows, launch_rows, target_folders, unit_rows
    from goc_deploy.engine_dir.directory import EngineDir

    directory = EngineDir.open(engine_dir)
    plans, manifest = directory.plans(), directory.manifest
    print_table("units", *unit_rows(directory))
    for folder in target_folders(manifest):
        print_table(folder, *engine_rows(directory, folder))
    print_table("launches", *launch_rows(plans, manifest))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of goc-plan."""
    return run_command(command, argv)
