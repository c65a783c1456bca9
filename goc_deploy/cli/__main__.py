"""The commands where they are not installed: ``python -m goc_deploy.cli run engine --labels 207``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = ("export", "plan", "run", "bench", "eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with or without ``goc-``; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0].removeprefix("goc-") if words else ""
    if name not in COMMANDS:
        sys.stderr.write(f"usage: python -m goc_deploy.cli {'|'.join(COMMANDS)} [ARGUMENTS]\n")
        return 2
    code: int = import_module(f"goc_deploy.cli.{name}").main(words[1:])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
