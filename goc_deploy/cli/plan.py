"""goc-plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import debug_option, print_table, run_command
from goc_deploy.cli.engine_options import build_engines_and_tell, engine_options, engines_from_options
from goc_deploy.samplers import SAMPLER_GRAMMAR

EPILOG = (
    "Examples: goc-plan engine fora:3+gc:1.0 --steps 50 --name fast; goc-plan engine --list; "
    "goc-plan engine --show fast --plot fast.png; goc-plan engine --backend tensorrt-rtx --compute-capability 8.9"
)


@click.command("goc-plan", epilog=EPILOG)
@click.argument("engine_dir", type=click.Path(path_type=Path))
@click.argument("spec", required=False)
@click.option("--name", help="Name of the new plan.  [default: SPEC made file-safe]")
@click.option("--steps", type=int, help="Sampling steps.  [default: those of the engine's first plan]")
@click.option("--sampler", help=f"{SAMPLER_GRAMMAR}.  [default: that of the engine's first plan]")
@click.option("--list", "list_plans", is_flag=True, help="List the plans.")
@click.option("--show", metavar="NAME", help="Show a plan's actions over steps.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="With --show: write a heat map of actions over steps and units (needs the plot extra).",
)
@click.option("--inspect", is_flag=True, help="Show the units, the engines, and what a step launches.")
@engine_options
@debug_option
def command(
    engine_dir: Path,
    spec: str | None,
    name: str | None,
    steps: int | None,
    sampler: str | None,
    list_plans: bool,
    show: str | None,
    plot: Path | None,
    inspect: bool,
    debug: bool,  # noqa: ARG001
    **options: Any,
) -> None:
    """Add the plan that SPEC names to ENGINE_DIR, list and show its plans, or build TensorRT engines for it."""
    engines = engines_from_options(options)
    if sum((spec is not None, list_plans, show is not None, inspect, bool(engines))) != 1:
        raise click.UsageError(
            "give a SPEC to add, --list, --show NAME, --inspect, or a --backend to build engines for"
        )
    if plot and not show:
        raise click.UsageError("--plot goes with --show NAME")
    if spec is None and (name or steps is not None or sampler):
        raise click.UsageError("--name, --steps and --sampler go with a SPEC")
    if spec:
        from goc_deploy.api import add_plan

        entry = add_plan(engine_dir, spec, name=name, steps=steps, sampler=sampler)
        click.echo(entry.name)
        return
    if engines:
        build_engines_and_tell(engine_dir, engines)
        return
    if inspect:
        _inspect(engine_dir)
        return
    from goc_deploy.engine_dir import load_plan
    from goc_deploy.outputs import check_suffix, check_writable
    from goc_deploy.publish import read_manifest
    from goc_deploy.show import action_rows, plan_rows

    check_suffix(plot, ".png", ".svg", ".pdf", what="--plot ends in .png, .svg or .pdf")
    check_writable(plot)
    manifest = read_manifest(engine_dir)
    if list_plans:
        columns, rows = plan_rows([load_plan(engine_dir, manifest, entry.name) for entry in manifest.plans], manifest)
        print_table(str(engine_dir), columns, rows)
        return
    plan = load_plan(engine_dir, manifest, show)
    columns, rows = action_rows(plan)
    print_table(
        f"{plan.name} ({plan.schedule.policy}), history {plan.schedule.history}, {plan.slots} cache slots",
        columns,
        rows,
    )
    if plot:
        from goc_deploy.plots import plot_schedule

        plot_schedule(plan.schedule, plan.name, plot)
        click.echo(plot)


def _inspect(engine_dir: Path) -> None:
    from goc_deploy.engine_dir import load_plan
    from goc_deploy.inspection import engine_rows, launch_rows, target_folders, unit_rows
    from goc_deploy.publish import read_manifest

    manifest = read_manifest(engine_dir)
    plans = [load_plan(engine_dir, manifest, entry.name) for entry in manifest.plans]
    print_table("units", *unit_rows(manifest))
    for folder in target_folders(manifest):
        print_table(folder, *engine_rows(engine_dir, manifest, folder))
    print_table("launches", *launch_rows(plans, manifest))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of goc-plan."""
    return run_command(command, argv)
