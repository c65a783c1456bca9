"""The SPEC of a policy as text: ``BASE[+CORRECTION][+head[:FEATURES]][,OPTION]...``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from goc_deploy.errors import UsageError
from goc_deploy.policies.options import argument_texts, arguments_of
from goc_deploy.policies.tables import BASES

_OPTION = re.compile(r",(?=[a-z_]+(?:=|,|$))")
FORM = "BASE[+CORRECTION][+head[:FEATURES]][,OPTION]..."
_HEAD = re.compile(r"\+head(?::([^/\\+]*))?$")
_CORRECTION = re.compile(r"\+(?=[a-z][a-z0-9_]*(?::[^/\\]*)?$)")
_PLAN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,99}")


@dataclass(frozen=True, slots=True)
class Policy:
    """A parsed SPEC.

    Attributes:
        text: the SPEC as written.
        base: (name, argument) of the part that decides what is computed.
        correction: (name, argument) of the part that decides how the rest is predicted, or None.
        options: (name, value) pairs; a flag has an empty value.
        head: what the SPEC has after ``+head:``, "" for the default, or None without a head.
    """

    text: str
    base: tuple[str, str]
    correction: tuple[str, str] | None
    options: tuple[tuple[str, str], ...]
    head: str | None = None

    @property
    def path(self) -> str:
        """The path of the file that the base reads, "" if it reads none."""
        name, written = self.base
        if name not in BASES:
            return ""
        options = BASES[name].options
        texts = argument_texts(options, written)
        return next(
            (
                texts[one.name]
                for one in arguments_of(options)
                if one.name in texts and isinstance(one.read(texts[one.name]), Path)
            ),
            "",
        )

    @property
    def recorded(self) -> str:
        """The SPEC for records that others read: of a path only the file's name."""
        return self.text.replace(self.path, Path(self.path).name, 1) if self.path else self.text

    @property
    def default_name(self) -> str:
        """The SPEC made file-safe, without folders and suffixes of files that it names."""
        return plan_name_from_spec(
            self.text.replace(self.path, Path(self.path).stem, 1) if self.path else self.text
        )


def parse_policy(text: str) -> Policy:
    """Parse a SPEC. Which names and options there are is checked when a schedule is made of it.

    Raises:
        UsageError: more than one correction or head, or an option given twice.
    """
    policies, *option_texts = _OPTION.split(text.strip())
    head = _HEAD.search(policies)
    policies = policies[: head.start()] if head else policies
    base = BASES.get(policies.partition(":")[0])
    takes_path = base is not None and any(one.takes_path for one in arguments_of(base.options))
    parts = _CORRECTION.split(policies) if takes_path else policies.split("+")
    if len(parts) > 2:
        raise UsageError(f"SPEC {text!r}: too many parts with '+'; the form is {FORM}")
    options = [
        (name, value) for name, _, value in (option.partition("=") for option in option_texts)
    ]
    if len({name for name, _ in options}) != len(options):
        raise UsageError(f"SPEC {text!r}: an option is given twice")
    correction = _named_argument(parts[1]) if len(parts) == 2 else None
    features = (head[1] or "") if head else None
    return Policy(text.strip(), _named_argument(parts[0]), correction, tuple(options), features)


def _named_argument(part: str) -> tuple[str, str]:
    name, _, argument = part.partition(":")
    return name, argument


def plan_name_from_spec(spec: str) -> str:
    """A SPEC made file-safe, which is a plan's default name."""
    return re.sub(r"[^A-Za-z0-9._+=,@-]", "-", spec)[:100]


def check_plan_name(name: str) -> str:
    """Return ``name`` if it can name a file anywhere, else raise UsageError."""
    if not _PLAN_NAME.fullmatch(name):
        raise UsageError(
            f"plan name {name!r} must be 1 to 100 letters, digits or ._+=,@- and start with "
            "a letter or digit"
        )
    return name
