"""Messages of the library in the words of the commands: flags in place of arguments.

The library names an argument in backquotes, with or without a value: ``use `cfg_scale=1` `` becomes
``use --cfg-scale 1``, and ```plugin=False` `` becomes ``--no-plugin``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import fields

from goc_deploy.options import (
    BenchOptions,
    EngineOptions,
    EvalOptions,
    ExportOptions,
    PlanOptions,
    RunOptions,
    ServeOptions,
    ShardOptions,
)

OTHERS = {  # flags that are not spelled as their argument
    "calibration_seed": "seed",
    "folder": "shards",
    "loras": "lora",
    "negative_prompts": "negative-prompt",
    "plans": "plan",
    "prompts": "prompt",
    "EngineOptions.capabilities": "compute-capability",
    "EngineOptions.scratch_limit_bytes": "engine-workspace",
    "EngineOptions.weight_mode": "engine-weights",
}
ARGUMENT = re.compile(r"`(?P<name>(EngineOptions\.)?[a-z_0-9]+)(=(?P<value>[^`]*))?`")


def _flags() -> dict[str, str]:
    """Argument -> flag without its dashes."""
    shared = (ExportOptions, PlanOptions, RunOptions, ServeOptions, BenchOptions, EvalOptions)
    names = {field.name for options in (*shared, ShardOptions) for field in fields(options)} - {
        "engine_dirs"
    }
    own = {f"EngineOptions.{field.name}": f"engine-{field.name}" for field in fields(EngineOptions)}
    own |= {f"EngineOptions.{name}": name for name in ("backend", "plugin")}
    return {name: name.replace("_", "-") for name in names} | own | OTHERS


FLAGS = _flags()


def with_flags(message: str) -> str:
    """A message of the library, with a flag in place of each argument in backquotes."""
    return ARGUMENT.sub(_flag, message)


def _flag(argument: re.Match[str]) -> str:
    name, value = argument["name"], argument["value"]
    if name not in FLAGS:
        return argument[0]
    if value == "False":
        return f"--no-{FLAGS[name]}"
    return f"--{FLAGS[name]}" + ("" if value in (None, "True") else f" {value}")


class FlagFormatter(logging.Formatter):
    """Formats what the library logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, with flags in place of arguments."""
        return with_flags(super().format(record))
