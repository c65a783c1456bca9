"""docs/architecture.md and CONTRIBUTING.md name layers, files, functions and calls that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache

import pytest

from tests.documents.files import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(?P<path>[\w/]+\.py):(?P<name>[\w.]+)`")
ENTRY = re.compile(
    r"(?P<indent> *)- `(?P<path>[\w/]+\.py):(?P<name>[\w.]+)`(, as `(?P<alias>\w+)`)?"
)
Function = ast.FunctionDef | ast.ClassDef

PLACES = sorted({(m["path"], m["name"]) for m in NAMED.finditer(PAGE)})


@cache
def functions(path: str) -> dict[str, Function]:
    """Functions, classes and methods of a file, by qualified name."""
    found: dict[str, Function] = {}
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, Function):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def names_in(path: str, name: str) -> set[str]:
    """Names in a function, and in the private functions and classes of its file that it uses."""
    private = {
        key.rpartition(".")[2]: node
        for key, node in functions(path).items()
        if re.search(r"(^|\.)_[A-Za-z]", key)
    }
    names: set[str] = set()
    todo: list[Function] = [functions(path)[name]]
    while todo:
        nodes = list(ast.walk(todo.pop()))
        new = {node.id for node in nodes if isinstance(node, ast.Name)}
        new |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        todo += [private[key] for key in (new - names) & private.keys()]
        names |= new
    return names


def calls() -> list[tuple[str, str, str]]:
    """(path, function, the name that it must use) of every indented function."""
    above: list[tuple[str, str]] = []
    pairs = []
    for line in PAGE.splitlines():
        entry = ENTRY.match(line)
        if entry is None:
            continue
        del above[len(entry["indent"]) // 2 :]
        if above:
            pairs.append((*above[-1], entry["alias"] or entry["name"].rpartition(".")[2]))
        above.append((entry["path"], entry["name"]))
    return pairs


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_function_that_is_named_exists(path: str, name: str) -> None:
    assert name in functions(path)


@pytest.mark.parametrize(("path", "name", "called"), calls())
def test_every_call_is_in_the_code(path: str, name: str, called: str) -> None:
    assert called in names_in(path, name)


def test_the_files_to_open_first_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(
        r"`((?:docs|tests|exporters|engines|runtime|goc_deploy)/[\w/]*(?:\.\w+)?)`", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_layers_of_the_drawing_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [one["layers"] for one in contracts["contracts"] if one["type"] == "layers"]
    drawn = [
        re.findall(r"^    (?!direction )(\w+)", room, re.MULTILINE)
        for room in re.findall(r"^  subgraph .*\n((?:    .*\n)+)  end$", PAGE, re.MULTILINE)
    ]
    assert drawn == [re.split(r" [|:] ", layer) for layer in layers]
