"""goc-plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import print_table, run_command
from goc_deploy.cli.engine_options import EngineRequest, engine_options, engines_from_flags
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    cfg_scale_option,
    common_options,
    output_option,
    plans_of_directory,
    sort_outputs,
    steps_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import SEGMENTS, PlanOptions
from goc_deploy.policies.help import calibrated, policy_help
from goc_deploy.samplers import SAMPLER_GRAMMAR

DEFAULTS = PlanOptions()
SPEC_OPTIONS = (
    *("name", "steps", "sampler", "calibrate", "seed", "cfg_scale", "segments", "full_precision"),
)
PLOTS = (".png", ".svg", ".pdf")
EPILOG = (
    "Examples: goc-plan engine fora:3+gc:1.0 --steps 50 --name fast; goc-plan engine --list; "
    "goc-plan engine --show fast --plot fast.png; "
    "goc-plan engine --backend tensorrt-rtx --compute-capability 8.9.\n\n"
    f"{policy_help()}"
)


@click.command("goc-plan", context_settings=SETTINGS, epilog=EPILOG)
@click.argument("engine_dir", type=PATH)
@click.argument("spec", required=False)
@click.option("--name", help="Name of the new plan.  [default: SPEC made file-safe]")
@steps_option(
    None,
    "Number of sampling steps of the new plan.  "
    "[default: that of the first plan of the engine directory]",
)
@click.option(
    "--sampler",
    help=f"Sampler of the new plan: {SAMPLER_GRAMMAR}.  "
    "[default: that of the first plan of the engine directory]",
)
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    metavar="K",
    help=f"Number of images that a calibrated policy ({calibrated()}) learns from.  "
    "[default: 16, of a head 512, fewer for large models]",
)
@click.option(
    "--seed",
    type=int,
    help="Seed of the calibration images.  [default: 2**32, far from the seeds that people use]",
)
@cfg_scale_option("Guidance scale of the calibration images.")
@click.option(
    "--segments",
    type=click.Choice(SEGMENTS),
    help="Part of a step that TensorRT runs as one engine: full is a full step, none is a unit.  "
    f"[default: {DEFAULTS.segments}]",
)
@click.option(
    "--full-precision",
    type=PATH,
    metavar="ENGINE_DIR",
    help="Engine directory of the same model whose weights are not quantised. A calibrated policy "
    "runs with quantised weights, and its images are compared with the uncached ones of this "
    "directory.  [default: compared with those with quantised weights]",
)
@click.option("--list", "list_plans", is_flag=True, help="List the plans of ENGINE_DIR.")
@click.option(
    "--show",
    metavar="NAME",
    shell_complete=plans_of_directory,
    help="Name of a plan whose actions over the steps are shown.",
)
@output_option(
    "File to write with --show, repeatable: .png, .svg or .pdf is --plot, .json is --smoothcache."
)
@click.option(
    "--plot",
    type=PATH,
    help="File to write a heat map of actions over steps and units to, with --show; a .png or .pdf "
    "needs the plot extra.",
)
@click.option(
    "--smoothcache",
    type=PATH,
    metavar="FILE.json",
    help="File to write what the plan computes to, with --show, in the form of SmoothCache's "
    "schedules.",
)
@click.option(
    "--inspect", is_flag=True, help="Show the units, the engines, and the launches of a step."
)
@engine_options
@common_options
def command(engine_dir: Path, **flags: Any) -> None:
    """Add the plan of a SPEC to ENGINE_DIR, list or show its plans, or build TensorRT engines."""
    _action(flags)(engine_dir)


def _action(flags: dict[str, Any]) -> Callable[[Path], None]:
    """The one of the five actions that the flags ask for.

    Raises:
        click.UsageError: no action, more than one, or a flag of another action.
    """
    engines = engines_from_flags(flags)
    spec, name = flags["spec"], flags["show"]
    suffixes = {PLOTS: flags["plot"], (".json",): flags["smoothcache"]}
    plot, smoothcache = sort_outputs(flags["outputs"], suffixes)
    options = {option: flags[option] for option in SPEC_OPTIONS if flags[option] is not None}
    actions: dict[Callable[[Path], None], bool] = {
        partial(_add, spec=spec, options=options): spec is not None,
        _list: flags["list_plans"],
        partial(_show, name=name, plot=plot, smoothcache=smoothcache): name is not None,
        _inspect: flags["inspect"],
        partial(_build, engines=engines): bool(engines.builds),
    }
    asked_for = [action for action, asked in actions.items() if asked]
    if len(asked_for) != 1:
        raise click.UsageError(
            "give a SPEC to add, --list, --show NAME, --inspect, "
            "or a --backend to build engines for"
        )
    if (plot or smoothcache) and name is None:
        raise click.UsageError("--plot and --smoothcache go with --show NAME")
    if spec is None and options:
        named = ", ".join("--" + option.replace("_", "-") for option in options)
        raise click.UsageError(f"{named} goes with a SPEC")
    return asked_for[0]


def _add(engine_dir: Path, spec: str, options: dict[str, Any]) -> None:
    """Add a plan, and print its name; what it computes goes to stderr."""
    from goc_deploy.api.facade import add_plan
    from goc_deploy.engine_dir.directory import EngineDir

    with progress_bar() as progress:
        entry = add_plan(engine_dir, spec, progress=progress, **options)
    plan = EngineDir.open(engine_dir).plan(entry.name)
    schedule = plan.schedule
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.kind_counts.items())
    click.echo(
        f"{schedule.policy}: {plan.steps} steps of {plan.sampler.sampler} ({kinds}), "
        f"{schedule.computed} of {plan.steps * schedule.units} units computed",
        err=True,
    )
    click.echo(entry.name)


def _list(engine_dir: Path) -> None:
    """Print a table of the plans."""
    from goc_deploy.display.plans import plan_rows
    from goc_deploy.engine_dir.directory import EngineDir

    directory = EngineDir.open(engine_dir)
    print_table(str(engine_dir), *plan_rows(directory.plans(), directory.manifest))


def _show(engine_dir: Path, name: str, plot: Path | None, smoothcache: Path | None) -> None:
    """Print the actions of a plan, and write them to files."""
    from goc_deploy.cli.paths import check_suffix, check_writable
    from goc_deploy.disk import written
    from goc_deploy.display.plans import action_rows, calibration_lines, head_rows
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.policies.smoothcache import smoothcache_from_schedule

    check_suffix(plot, *PLOTS, what="--plot ends in .png, .svg or .pdf")
    check_suffix(smoothcache, ".json", what="--smoothcache ends in .json")
    check_writable(plot)
    check_writable(smoothcache)
    plan = EngineDir.open(engine_dir).plan(name)
    print_table(
        f"{plan.name} ({plan.schedule.policy}), history {plan.schedule.history}, "
        f"{plan.slots} cache slots",
        *action_rows(plan),
    )
    if plan.sampler.head is not None:
        print_table("head", *head_rows([plan]))
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


def _inspect(engine_dir: Path) -> None:
    """Print the units, the engines of each target, the memory of each plan, and its launches."""
    from goc_deploy.display.engines import (
        budget_rows,
        engine_rows,
        graph_rows,
        launch_rows,
        lora_rows,
        target_folders,
    )
    from goc_deploy.display.plans import head_rows, history_rows
    from goc_deploy.display.units import stream_rows, unit_rows
    from goc_deploy.engine_dir.directory import EngineDir

    directory = EngineDir.open(engine_dir)
    plans, manifest = directory.plans(), directory.manifest
    if manifest.loras:
        print_table("LoRAs merged into the weights", *lora_rows(manifest))
    print_table("blocks", *unit_rows(manifest))
    if manifest.model.skip_guidance_layers:
        skipped = ", ".join(map(str, manifest.model.skip_guidance_layers))
        click.echo(f"skip-layer guidance leaves out the blocks {skipped}")
    print_table("units", *graph_rows(directory))
    budget = budget_rows(manifest)
    if budget is not None:
        print_table(budget[0], *budget[1])
    for folder in target_folders(manifest):
        print_table(folder, *engine_rows(directory, folder))
    if any(plan.sampler.head is not None for plan in plans):
        print_table("heads", *head_rows(plans))
    print_table("history, by the form of the plan", *history_rows(plans, manifest))
    for stream in manifest.model.streams[1:]:
        print_table(stream, *stream_rows(plans, manifest, stream))
    print_table("launches", *launch_rows(plans, manifest))


def _build(engine_dir: Path, engines: EngineRequest) -> None:
    """Build TensorRT engines."""
    from goc_deploy.engine_dir.directory import EngineDir

    engines.check(EngineDir.open(engine_dir).manifest.precision)
    engines.build(engine_dir)


main = partial(run_command, command)  # entry point of goc-plan

if __name__ == "__main__":
    raise SystemExit(main())
