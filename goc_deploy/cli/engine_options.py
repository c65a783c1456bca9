"""Options of commands that build TensorRT engines, and building them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from goc_deploy.cli.options import composed
from goc_deploy.cli.progress import progress_bar
from goc_deploy.engine_dir.keys import ENGINE_BACKENDS, WEIGHT_MODES
from goc_deploy.options import EngineOptions
from goc_deploy.precision import Precision

if TYPE_CHECKING:
    from goc_deploy.engine_dir.directory import EngineDir

DEFAULTS = EngineOptions()


engine_options = composed(  # a command gets them as backends, engine_* and verify
    click.option(
        "--backend",
        "backends",
        multiple=True,
        type=click.Choice(["onnxruntime", *ENGINE_BACKENDS]),
        help="Backend to build engines for, repeatable; onnxruntime needs none.",
    ),
    click.option(
        "--compute-capability",
        "engine_capabilities",
        multiple=True,
        metavar="X.Y",
        help="Compute capability of a GPU to build for, repeatable.  "
        "[default: tensorrt-rtx: all from 8.0 on; tensorrt: that of this machine]",
    ),
    click.option(
        "--engine-weights",
        type=click.Choice(WEIGHT_MODES),
        default=DEFAULTS.weight_mode,
        help="How engines hold their weights: embedded is an engine per unit that holds them, "
        "shared is an engine per kind of unit that reads them at an address.",
    ),
    click.option(
        "--engine-workspace",
        type=click.IntRange(0),
        default=DEFAULTS.scratch_limit_bytes >> 20,
        metavar="MIB",
        help="Limit of the scratch memory of an engine in MiB; 0 is no limit.",
    ),
    click.option(
        "--plugin/--no-plugin",
        "engine_plugin",
        default=DEFAULTS.plugin,
        help="Use the plugin if it saves launches.",
    ),
    click.option(
        "--verify",
        is_flag=True,
        help="Run every engine on the GPU of this machine afterwards, and compare the results with "
        "ONNX Runtime.",
    ),
)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """TensorRT engines that a command is asked to build.

    Attributes:
        builds: the options of each backend.
        verify: run the engines on the GPU of this machine after they are built.
    """

    builds: tuple[EngineOptions, ...]
    verify: bool

    def check(self, precision: Precision) -> None:
        """Check that the engines can be built here, before anything else is done.

        Raises:
            UsageError, EnvironmentUnsupportedError: as `goc_deploy.api.check_engine_options`.
        """
        from goc_deploy.api.engines import check_engine_options

        for options in self.builds:
            check_engine_options(options, precision, verify=self.verify)

    def build(self, directory: Path) -> None:
        """Build what is missing, verify it if asked to, and print a summary on stderr."""
        from goc_deploy.api.engines import build_engines, verify_engines
        from goc_deploy.engine_dir.directory import EngineDir

        for options in self.builds:
            with progress_bar() as progress:
                manifest, built = build_engines(directory, options, progress)
            click.echo(
                f"{directory}: {_built(EngineDir(directory, manifest), options.backend, built)}",
                err=True,
            )
            if not self.verify:
                continue
            with progress_bar() as progress:
                differences = verify_engines(directory, options, progress)
            worst = max(differences, key=lambda difference: difference.relative_l2)
            click.echo(
                f"{directory}: {len(differences)} graphs run on {options.backend} as on ONNX "
                f"Runtime; the largest relative L2 difference is {worst.relative_l2:.1e} "
                f"({worst.unit})",
                err=True,
            )


def _built(directory: EngineDir, backend: str, built: int) -> str:
    """How many engines were built, and how many there are now."""
    engines = [engine for engine in directory.manifest.engines if engine.target.backend == backend]
    size = sum(directory.size(path) for path in {engine.path for engine in engines})
    return (
        f"{built} engines built for {backend}, {len(engines)} are there ({size / 1e6:.1f} MB), "
        f"{sum(engine.plugin_layers > 0 for engine in engines)} with the plugin"
    )


def engines_from_flags(flags: dict[str, Any]) -> EngineRequest:
    """Take the flags of engines out of the flags of a command.

    Raises:
        click.UsageError: flags of engines, but no backend that has any.
    """
    verify = flags.pop("verify")
    backends = [name for name in dict.fromkeys(flags.pop("backends")) if name in ENGINE_BACKENDS]
    options = EngineOptions(
        capabilities=flags.pop("engine_capabilities"),
        weight_mode=flags.pop("engine_weights"),
        scratch_limit_bytes=flags.pop("engine_workspace") * 2**20,
        plugin=flags.pop("engine_plugin"),
    )
    if not backends and (options != DEFAULTS or verify):
        raise click.UsageError(
            f"options of engines go with --backend {' or --backend '.join(ENGINE_BACKENDS)}"
        )
    return EngineRequest(tuple(replace(options, backend=name) for name in backends), verify)
