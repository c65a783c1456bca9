"""goc: the commands under one name. A command's module is imported when the command is used."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import click

from goc_deploy.cli.app import run_command
from goc_deploy.cli.options import SETTINGS, version_option

COMMANDS = {
    "export": "Compile a checkpoint into an engine directory.",
    "plan": "Add, list and show plans, and build TensorRT engines.",
    "run": "Generate images from an engine directory.",
    "serve": "Serve engine directories with the OpenAI Images API.",
    "bench": "Measure the speed of plans side by side.",
    "eval": "Measure the quality of plans beside no cache.",
}


class LazyGroup(click.Group):
    """Commands that are known by name and by one sentence before they are imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of work."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """The command of that name, also with ``goc-`` in front."""
        name = cmd_name.removeprefix("goc-")
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"goc_deploy.cli.{name}").command
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    "goc", cls=LazyGroup, context_settings=SETTINGS, epilog="Example: goc export model.pt -o engine"
)
@version_option
def command() -> None:
    """Compile Diffusion Transformers with feature caching, and run them.

    Each command also has a name of its own: goc-run is goc run.
    """


main = partial(run_command, command)  # entry point of goc and of ``python -m goc_deploy``

if __name__ == "__main__":
    raise SystemExit(main())
