"""The SPEC of a policy as text: ``BASE[+CORRECTION][,OPTION]...``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from goc_deploy.errors import UsageError

GRAMMAR = (
    "none, fora:INTERVAL[@FRACTION], l2c:ROUTER.pt[@THRESHOLD], smoothcache:ALPHA, search:BUDGET[ms] or file:SCHEDULE.json, then +gc[:ETA], "
    "+goc[:ETA], +steps:K,K,..:ETA, +fit[:N], +taylor[:ORDER], +lagrange[:ORDER] or +hermite[:ORDER[:SIGMA]], then options "
    "such as ,history=computed"
)
BASE_NAMES = ("none", "fora", "l2c", "file", "search", "smoothcache")
CORRECTION_NAMES = ("gc", "steps", "taylor", "lagrange", "hermite", "goc", "fit")
FLAGS = ("both_branches", "per_unit", "units")
BASES_WITH_A_PATH = ("file", "l2c", "smoothcache")
_OPTION = re.compile(rf",(?=[a-z_]+=|(?:{'|'.join(FLAGS)})(?:,|$))")
_CORRECTION = re.compile(r"\+(?=[a-z][a-z0-9_]*(?::[^/\\]*)?$)")
_PLAN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,99}")


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A parsed SPEC.

    Attributes:
        text: the SPEC as written.
        base: (name, argument) of the part that says what is computed.
        correction: (name, argument) of the part that says how reused units are predicted, or None.
        options: (name, value) pairs; a flag has an empty value.
    """

    text: str
    base: tuple[str, str]
    correction: tuple[str, str] | None
    options: tuple[tuple[str, str], ...]

    @property
    def recorded(self) -> str:
        """The SPEC for records that others read: of a path only the file's name."""
        return self.text.replace(self._path, Path(self._path).name, 1) if self._path else self.text

    @property
    def default_name(self) -> str:
        """The SPEC made file-safe, without folders and suffixes of files that it names."""
        return plan_name_from_spec(
            self.text.replace(self._path, Path(self._path).stem, 1) if self._path else self.text
        )

    @property
    def _path(self) -> str:
        name, argument = self.base
        if name not in BASES_WITH_A_PATH or (
            name == "smoothcache" and not argument.endswith(".json")
        ):
            return ""
        return split_threshold(argument)[0] if name == "l2c" else argument


def parse_policy(text: str) -> PolicySpec:
    """Parse a SPEC. Which names and options there are is checked when a schedule is made of it.

    Raises:
        UsageError: more than one correction, or an option given twice.
    """
    head, *option_texts = _OPTION.split(text.strip())
    parts = (
        _CORRECTION.split(head) if head.partition(":")[0] in BASES_WITH_A_PATH else head.split("+")
    )
    if len(parts) > 2:
        raise UsageError(
            f"SPEC {text!r}: more than one '+'; the form is BASE[+CORRECTION][,OPTION]..."
        )
    options = [
        (name, value) for name, _, value in (option.partition("=") for option in option_texts)
    ]
    if len({name for name, _ in options}) != len(options):
        raise UsageError(f"SPEC {text!r}: an option stands twice")
    correction = _named_argument(parts[1]) if len(parts) == 2 else None
    return PolicySpec(text.strip(), _named_argument(parts[0]), correction, tuple(options))


def _named_argument(part: str) -> tuple[str, str]:
    name, _, argument = part.partition(":")
    return name, argument


def split_threshold(argument: str) -> tuple[str, str]:
    """``PATH[@THRESHOLD]`` in two; an ``@`` that no number follows belongs to the path."""
    path, at, threshold = argument.rpartition("@")
    if at and re.fullmatch(r"[0-9.eE+-]+", threshold):
        return path, threshold
    return argument, ""


def number(text: str, what: str) -> float:
    """A number of a SPEC.

    Raises:
        UsageError: not a number, or not below 1000 in magnitude.
    """
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number") from None
    if not abs(value) < 1e3:
        raise UsageError(f"{what} {text} is out of range")
    return value


def whole_number(text: str, what: str, low: int, high: int) -> int:
    """A whole number of a SPEC within ``low..high``.

    Raises:
        UsageError: it is not.
    """
    if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise UsageError(f"{what} {text!r:.60} must be a whole number from {low} to {high}")
    return int(text)


def plan_name_from_spec(spec: str) -> str:
    """A SPEC made file-safe, which is a plan's default name."""
    return re.sub(r"[^A-Za-z0-9._+=,@-]", "-", spec)[:100]


def check_plan_name(name: str) -> str:
    """Return ``name`` if it can name a file anywhere, else raise UsageError."""
    if not _PLAN_NAME.fullmatch(name):
        raise UsageError(
            f"plan name {name!r} must be 1 to 100 letters, digits or ._+=,@- and start with a letter or digit"
        )
    return name
