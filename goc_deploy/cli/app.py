"""What every command shares: error to exit code, signals, shell completion, tables."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import shell_complete

from goc_deploy.cli.flags import FlagFormatter, with_flags
from goc_deploy.errors import GocError, ResourceError

INTERRUPTED, TERMINATED, BUG = 130, 143, 1
OUT_OF = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_received: int | None = None  # the signal that asked this command to end


def run_command(command: click.Command, argv: Sequence[str] | None = None) -> int:
    """Run a click command and return its exit code.

    Errors of ours end as one sentence on stderr and their code; usage errors as click prints them and 2; Ctrl-C as
    130, SIGTERM as 143; anything else is a bug of ours: 1.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    debug = "--debug" in args
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    _catch_signals()
    _complete(command)
    try:
        with command.make_context(command.name, args) as context:
            command.invoke(context)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _interrupted()
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the interpreter's last flush is silent
        return 0
    except Exception as error:
        if debug:
            raise
        if (
            _received is not None
        ):  # native code turns what the signal handler raises into errors of its own
            return _interrupted()
        if isinstance(error, GocError):
            return _say(f"error: {with_flags(str(error))}", error.exit_code)
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OUT_OF):
            return _say(
                f"error: this machine is short of memory, disk or open files: {error}",
                ResourceError.exit_code,
            )
        return _say(
            f"error: a bug in goc_deploy: {type(error).__name__}: {error}; run again with --debug and report it",
            BUG,
        )
    return 0


def _open_streams() -> None:
    """Python has None for streams that were closed by whoever started the command; what is written there is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (it stays open)


def _complete(command: click.Command) -> None:
    """Answer a shell that asks for completion, and exit.

    Click's own ``main`` does no more for us: it ends with 1 where a pipe was closed, and takes an EOFError for Ctrl-C.
    """
    name = command.name or ""
    variable = f"_{name.replace('-', '_')}_COMPLETE".upper()
    if instruction := os.environ.get(variable):
        raise SystemExit(shell_complete(command, {}, name, variable, instruction))


def _catch_signals() -> None:
    global _received
    _received = None
    sys.unraisablehook = _report_unless_interrupted
    signal.signal(signal.SIGTERM, _on_signal)
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a parent may have it ignored
        signal.signal(signal.SIGINT, _on_signal)


def _on_signal(number: int, _frame: Any) -> None:
    global _received
    _received = number
    raise_if_interrupted()


def _report_unless_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """Say nothing of an interruption that Python swallows: the command ends at its next report of progress."""
    if _received is None or not isinstance(unraisable.exc_value, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(unraisable)


def raise_if_interrupted() -> None:
    """Python swallows what a signal handler raises while a weak reference dies, so commands ask again as they go."""
    if _received is not None:
        raise KeyboardInterrupt if _received == signal.SIGINT else SystemExit(TERMINATED)


def _interrupted() -> int:
    code = TERMINATED if _received == signal.SIGTERM else INTERRUPTED
    return _say("interrupted; nothing was left half written", code)


def _say(message: str, code: int) -> int:
    with contextlib.suppress(
        OSError, ValueError
    ):  # standard error may be full or closed; the code tells it too
        click.echo(message, err=True)
    return code


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; numbers are right-aligned by their content."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()  # rich would exit by itself where stdout is a closed pipe
    Console(file=text, width=None if sys.stdout.isatty() else 140).print(table)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
