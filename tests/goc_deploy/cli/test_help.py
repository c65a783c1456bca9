"""The help of every option is a sentence that shows the default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

import click
import pytest

from goc_deploy.cli.goc import COMMANDS


def options() -> Iterator[tuple[str, click.Option]]:
    for command in COMMANDS:
        for option in import_module(f"goc_deploy.cli.{command}").command.params:
            if isinstance(option, click.Option):
                yield command, option


@pytest.mark.parametrize(
    ("command", "option"),
    [pytest.param(*pair, id=f"{pair[0]} {pair[1].opts[0]}") for pair in options()],
)
def test_a_help_text_is_a_sentence(command: str, option: click.Option) -> None:
    text, _, default = (option.help or "").partition("  [default: ")
    assert re.fullmatch(r"[A-Z].*[A-Za-z0-9\])]\.", text, re.DOTALL), text
    assert len(text.split()) >= 3
    assert not re.search(r"\bwhere\b|\bso many\b|\bthese images\b|  ", text)
    context = click.Context(import_module(f"goc_deploy.cli.{command}").command, show_default=True)
    has_default = isinstance(option.get_default(context), (str, int, float))
    if default:  # is written only if click has none to show
        assert default.endswith("]")
        assert not has_default or option.show_default is False
    shown = (option.get_help_record(context) or ("", ""))[1]
    assert str(2**32) not in shown
    if has_default and not option.is_flag:
        assert "[default: " in shown
