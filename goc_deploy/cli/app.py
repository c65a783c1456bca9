"""What every command shares: exit codes of errors, signals, shell completion, tables."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
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
# The dynamic loader, protobuf and Python's threads report in the text of other errors what ran out.
RAN_OUT = re.compile(
    "out of memory|cannot allocate memory|cannot map zero-fill pages|too many open files"
    "|can't start new thread"
    "|failed to map segment from shared object(?!: operation not permitted)",
    re.IGNORECASE,
)

_received: int | None = None  # the signal that asked this command to end


def run_command(command: click.Command, argv: Sequence[str] | None = None) -> int:
    """Run a click command and return its exit code.

    An error of goc_deploy is printed as one sentence on stderr and ends with its own code. A usage
    error is printed by click and ends with 2, Ctrl-C with 130, SIGTERM with 143. Any other error is
    a bug of goc_deploy and ends with 1.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
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
        # so that the interpreter's last flush prints nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--debug" in args:
            raise
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Print an error as one sentence; the exit code."""
    if _received is not None:  # native code turns what the signal handler raises into own errors
        return _interrupted()
    if isinstance(error, GocError):
        return _print_error(f"error: {with_flags(str(error))}", error.exit_code)
    if _is_short_of_resources(error):
        message = "error: this machine is short of memory, disk, threads or open files"
        return _print_error(f"{message}: {error}", ResourceError.exit_code)
    message = f"error: a bug in goc_deploy: {type(error).__name__}: {error}"
    return _print_error(f"{message}; run again with --debug and report it", BUG)


def _is_short_of_resources(error: Exception) -> bool:
    """Whether memory, disk, open files or threads ran out; Python has no class for all of these."""
    if isinstance(error, OSError):
        return error.errno in OUT_OF
    return isinstance(error, MemoryError) or RAN_OUT.search(str(error)) is not None


def _open_streams() -> None:
    """Replace streams that the caller closed, which are None, by one that discards its input."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open)
            setattr(sys, name, stream)


def _complete(command: click.Command) -> None:
    """Answer a shell that asks for completion, and exit.

    Click's own ``main`` is not used: it returns 1 if a pipe was closed, and treats an EOFError as
    Ctrl-C.
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
    # a parent may have set it to be ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_signal)


def _on_signal(number: int, _frame: Any) -> None:
    global _received
    _received = number
    raise_if_interrupted()


def _report_unless_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """Print nothing about an interruption that Python swallows.

    The command ends at its next report of progress.
    """
    if _received is None or not isinstance(unraisable.exc_value, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(unraisable)


def raise_if_interrupted() -> None:
    """Raise again what a signal handler raised.

    Python swallows an exception of a signal handler that runs while a weak reference dies.
    """
    if _received is not None:
        raise KeyboardInterrupt if _received == signal.SIGINT else SystemExit(TERMINATED)


def _interrupted() -> int:
    code = TERMINATED if _received == signal.SIGTERM else INTERRUPTED
    return _print_error("interrupted; nothing was left half written", code)


def _print_error(message: str, code: int) -> int:
    # standard error may be full or closed; the code tells the caller too
    with contextlib.suppress(OSError, ValueError):
        click.echo(message, err=True)
    return code


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; all columns but the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()  # rich would exit by itself if stdout is a closed pipe
    Console(file=text, width=None if sys.stdout.isatty() else 140).print(table)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
