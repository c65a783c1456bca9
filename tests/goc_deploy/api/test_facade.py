"""The public functions name their arguments, as the dataclasses of options do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

import goc_deploy
from goc_deploy.errors import UsageError
from goc_deploy.options import ExportOptions, PlanOptions


def default(field: Field[Any]) -> Any:
    assert field.default is not MISSING
    return field.default


@pytest.mark.parametrize(
    ("function", "options"),
    [(goc_deploy.export, ExportOptions), (goc_deploy.add_plan, PlanOptions)],
)
def test_a_signature_has_the_fields_and_the_defaults_of_its_options(
    function: Callable[..., Any], options: type[Any]
) -> None:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert named.pop("progress")
    assert named == {field.name: default(field) for field in fields(options)}
    documented = inspect.getdoc(function) or ""
    assert all(f"\n    {name}: " in documented for name in named)


def test_a_thread_pool_that_is_too_large_is_refused(golden_engine: Path) -> None:
    with pytest.raises(UsageError, match="threads must be a whole number and at most 1024"):
        goc_deploy.load(golden_engine, threads=10**9)


def test_an_argument_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"export\(\) got an unexpected keyword argument 'plan'"):
        goc_deploy.export("model.pt", "engine", plan="none")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"add_plan\(\) got an unexpected keyword argument 'step'"):
        goc_deploy.add_plan("engine", "none", step=3)  # type: ignore[call-arg]
