"""Options of commands that build TensorRT engines, and building them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.progress import progress_bar
from goc_deploy.engine_dir.keys import ENGINE_BACKENDS, WEIGHT_MODES
from goc_deploy.options import EngineOptions

DEFAULTS = EngineOptions()


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command, which gets them as ``backends``, ``engine_*`` and ``verify``."""
    options = (
        click.option(
            "--backend",
            "backends",
            multiple=True,
            type=click.Choice(["onnxruntime", *ENGINE_BACKENDS]),
            help="Build engines for it, repeatable; onnxruntime needs none.",
        ),
        click.option(
            "--compute-capability",
            "engine_capabilities",
            multiple=True,
            metavar="X.Y",
            help="GPU to build for, repeatable.  [default: tensorrt-rtx: all from 8.0 on; tensorrt: this machine's]",
        ),
        click.option(
            "--engine-weights",
            type=click.Choice(WEIGHT_MODES),
            default=DEFAULTS.weights,
            help="An engine per unit with its weights, or one per kind of unit, which reads them at an address.",
        ),
        click.option(
            "--engine-workspace",
            type=click.IntRange(0),
            default=DEFAULTS.workspace_bytes >> 20,
            metavar="MIB",
            help="Most scratch memory of an engine; 0 is no limit.",
        ),
        click.option(
            "--plugin/--no-plugin",
            "engine_plugin",
            default=DEFAULTS.plugin,
            help="Use the plugin where it saves launches.",
        ),
        click.option(
            "--verify",
            is_flag=True,
            help="Then run every engine on the GPU of this machine, and compare with ONNX Runtime.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def engines_from_options(options: dict[str, Any]) -> tuple[list[EngineOptions], bool]:
    """Take the engine options out of a command's options: what to build, one per backend, and whether to verify it.

    Raises:
        click.UsageError: options of engines, but no backend that has any.
        EnvironmentUnsupportedError: verification without a GPU.
    """
    verify = options.pop("verify")
    backends = [name for name in dict.fromkeys(options.pop("backends")) if name in ENGINE_BACKENDS]
    how = EngineOptions(
        capabilities=options.pop("engine_capabilities"),
        weights=options.pop("engine_weights"),
        workspace_bytes=options.pop("engine_workspace") * 2**20,
        plugin=options.pop("engine_plugin"),
    )
    if not backends and (how != DEFAULTS or verify):
        raise click.UsageError(
            f"options of engines go with --backend {' or --backend '.join(ENGINE_BACKENDS)}"
        )
    if verify:
        from goc_deploy.api.facade import check_gpu

        check_gpu()
    return [replace(how, backend=name) for name in backends], verify


def build_engines_and_tell(directory: Path, wanted: list[EngineOptions], *, verify: bool) -> None:
    """Build what is missing, with a progress bar, verify it if asked to, and say on stderr what came of it."""
    from goc_deploy.api.facade import build_engines, verify_engines
    from goc_deploy.engine_dir.directory import EngineDir

    for options in wanted:
        with progress_bar() as progress:
            manifest, built = build_engines(directory, options, progress)
        engines = [
            engine for engine in manifest.engines if engine.target.backend == options.backend
        ]
        size_of = EngineDir(directory, manifest).size
        size = sum(size_of(path) for path in {engine.path for engine in engines})
        click.echo(
            f"{directory}: {built} engines built for {options.backend}, {len(engines)} are there ({size / 1e6:.1f} MB), "
            f"{sum(engine.plugin_layers > 0 for engine in engines)} with the plugin",
            err=True,
        )
        if verify:
            with progress_bar() as progress:
                found = verify_engines(directory, options, progress)
            worst = max(found, key=lambda difference: difference.relative_l2)
            click.echo(
                f"{directory}: {len(found)} graphs run on {options.backend} as on ONNX Runtime; the largest relative L2 difference "
                f"is {worst.relative_l2:.1e} ({worst.unit})",
                err=True,
            )
