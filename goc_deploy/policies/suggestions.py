"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from goc_deploy.errors import UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.tables import BASE_NAMES, CORRECTION_NAMES

HEAD = "head"
_DASHED = re.compile(rf"(?<![a-z])({'|'.join((*BASE_NAMES, *CORRECTION_NAMES, HEAD))})-")


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a word, if one is."""
    matches = get_close_matches(word, list(known), n=1)
    return matches[0] if matches else None


def meant_spec(text: str) -> str | None:
    """The SPEC that a text is, or would be if a plan's name were one (``fora-2+gc-1.2``).

    None if its policies do not exist. Arguments and options are not checked.
    """
    for candidate in (text, _DASHED.sub(r"\1:", text)):
        try:
            policy = parse_policy(candidate)
        except UsageError:
            continue
        if policy.base[0] in BASE_NAMES and (
            policy.correction is None or policy.correction[0] in CORRECTION_NAMES
        ):
            return candidate
    return None


def hint_for_policy(name: str) -> str:
    """How to write a base policy instead of ``name``, which is none."""
    if not name:
        return "begin with what is computed, such as fora:2+goc"
    if name == HEAD:
        return "it corrects the latents, so it comes last, such as fora:2+lagrange:2+head"
    if name in CORRECTION_NAMES:
        return f"it predicts what a policy reuses, so it comes after one, such as fora:2+{name}"
    meant = meant_spec(name) or closest(name, BASE_NAMES)
    return f"did you mean {meant}?" if meant else f"the policies are {', '.join(BASE_NAMES)}"


def hint_for_correction(name: str) -> str:
    """How to write a correction instead of ``name``, which is none."""
    spec = meant_spec(f"none+{name}")
    meant = spec.removeprefix("none+") if spec else closest(name, (*CORRECTION_NAMES, HEAD))
    return (
        f"did you mean +{meant}?" if meant else f"the corrections are {', '.join(CORRECTION_NAMES)}"
    )
