"""Options that several commands share, with the same names, types and help in each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from goc_deploy.guidance import DEFAULT_SCALES
from goc_deploy.options import HISTORIES
from goc_deploy.precision import DTYPE_OF_PRECISION, PRECISIONS
from goc_deploy.version import __version__

SETTINGS: dict[str, Any] = {"show_default": True, "help_option_names": ["-h", "--help"]}
LONG_NAMES = {dtype: precision for precision, dtype in DTYPE_OF_PRECISION.items()}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def composed(*options: Decorator) -> Decorator:
    """Several options as one decorator; they stand in the help in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


version_option = click.version_option(__version__, message="%(prog)s %(version)s")
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    help="Size of the thread pool; 0 is one thread per core.",
)
backend_option = click.option(
    "--backend",
    default="auto",
    help="Backend that runs the plans: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime, or "
    "auto, the first of these that works here.",
)
device_option = click.option(
    "--device",
    default="auto",
    help="Device that the backend uses: cpu, cuda, cuda:1 for another GPU than the first, or auto, "
    "which leaves it to the backend.",
)
history_option = click.option(
    "--history",
    type=click.Choice(HISTORIES),
    default="auto",
    help="What is kept for later steps: features of every unit, sums of what later steps add, "
    "which take less memory, or auto, which takes sums if they save much.",
)
cfg_channels_option = click.option(
    "--cfg-channels",
    type=click.IntRange(0),
    help="Number of leading channels that guidance acts on.  "
    "[default: that of the model's reference implementation]",
)


def _log_more(_context: click.Context, _parameter: click.Parameter, verbose: bool) -> None:
    if verbose:
        import logging

        logging.getLogger("goc_deploy").setLevel(logging.INFO)


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_log_more,
    help="Print more on stderr, such as the reason why a faster backend does not work here.",
)
common_options = composed(verbose_option, debug_option, version_option)


def cfg_scale_option(
    text: str = "Classifier-free guidance scale; 1 turns guidance off.",
) -> Decorator:
    """The guidance scale, under our name and under that of diffusers."""
    return click.option(
        "--cfg-scale",
        "--guidance-scale",
        "cfg_scale",
        type=float,
        help=f"{text}  [default: {DEFAULT_SCALES}]",
    )


def steps_option(default: int | None, text: str) -> Decorator:
    """The number of sampling steps, under our name and under that of diffusers."""
    return click.option(
        "--steps", "--num-inference-steps", "steps", type=int, default=default, help=text
    )


def compared_plans(help_text: str) -> Decorator:
    """The engine directory, and plans of it that a command compares."""
    return composed(
        click.argument("engine_dir", type=PATH),
        click.option(
            "--plan", "plans", multiple=True, shell_complete=plans_of_directory, help=help_text
        ),
    )


def plans_of_directory(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a plan of the ENGINE_DIR that was typed before."""
    directory = context.params.get("engine_dir") or next(
        iter(context.args), ""
    )  # not yet assigned before "--plan" has a value
    try:
        text = (Path(directory) / "manifest.json").read_text(encoding="utf-8")
        plans = [(str(plan["name"]), str(plan["policy"])) for plan in json.loads(text)["plans"]]
    except (KeyError, TypeError, ValueError, OSError):
        return []  # a shell has no place for a message; the command itself reports what is wrong
    return [CompletionItem(name, help=spec) for name, spec in plans if name.startswith(incomplete)]


class NamedPath(click.Path):
    """A path whose name is UTF-8, as are the files that name it and are written after the work."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path.

        Raises:
            click.BadParameter: the name has a null byte or is not UTF-8.
        """
        if "\0" in str(value):
            self.fail(f"{str(value)!a} has a null byte, as no file name can", param, ctx)
        path = super().convert(value, param, ctx)
        if any("\ud800" <= character <= "\udfff" for character in str(path)):
            self.fail(f"{str(path)!a} is not UTF-8; choose or rename to another name", param, ctx)
        return path


PATH = NamedPath()


class Precision(click.Choice):
    """A precision under our short name or under that of NumPy and PyTorch."""

    def __init__(self) -> None:
        super().__init__(PRECISIONS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The short name."""
        return super().convert(LONG_NAMES.get(value, value), param, ctx)


class Size(click.ParamType):
    """A width and a height in pixels, such as ``1024x768``."""

    name = "WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """The two numbers."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", value)
        if match is None:
            self.fail(f"{value!r:.60} must be a width and a height, such as 1024x768", param, ctx)
        return int(match[1]), int(match[2])


class SkipScale(click.ParamType):
    """A scale, or a scale and the shares where it starts and stops, such as ``2.8:0.01:0.2``."""

    name = "SCALE[:START:STOP]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, ...]:
        """The number or the three numbers."""
        if isinstance(value, float | tuple):
            return value
        try:
            scale, *window = map(float, value.split(":"))
            if not window:
                return scale
            start, stop = window
        except ValueError:
            self.fail(
                f"{value!r:.60} must be a scale, or SCALE:START:STOP such as 2.8:0.01:0.2",
                param,
                ctx,
            )
        return scale, start, stop


def whole_numbers(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[int, ...]:
    """A click callback that splits a comma-separated list; it is empty if none is given."""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} must be whole numbers separated by commas") from None


def output_option(help_text: str) -> Decorator:
    """``-o FILE``, repeatable; the suffix selects one of a command's files (`sort_outputs`)."""
    return click.option(
        "-o", "--output", "outputs", type=PATH, multiple=True, metavar="FILE", help=help_text
    )


def sort_outputs(
    outputs: tuple[Path, ...], given: dict[tuple[str, ...], Path | None]
) -> list[Path | None]:
    """Give each ``-o FILE`` to the option that writes files of that kind.

    Args:
        outputs: values of ``-o``.
        given: suffixes -> the value of the option that writes such files.

    Returns:
        The value of each option of ``given``, in order.

    Raises:
        click.UsageError: no option writes such a file, or it has a value already.
    """
    files = dict(given)
    for path in outputs:
        kind = next((suffixes for suffixes in files if path.suffix.lower() in suffixes), None)
        if kind is None:
            ends = ", ".join(suffix for suffixes in files for suffix in suffixes)
            raise click.UsageError(f"-o {path}: its name must end in one of {ends}")
        if files[kind] is not None:
            raise click.UsageError(
                f"-o {path}: {files[kind]} is written already; give one file of each kind"
            )
        files[kind] = path
    return list(files.values())
