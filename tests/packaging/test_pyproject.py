from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from goc_deploy.version import __version__
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_packaged() -> None:
    folders = {
        "goc_deploy": "goc_deploy",
        "exporters": "goc_deploy.exporters",
        "engines": "goc_deploy.engines",
        "runtime": "goc_deploy.runtime",
    }
    found = set()
    for top, package in folders.items():
        for init in (ROOT / top).glob("**/__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / top).parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_links_point_at_the_stages() -> None:
    for stage in ("exporters", "engines", "runtime"):
        assert (ROOT / "goc_deploy" / stage).readlink() == Path("..") / stage


def test_what_a_service_installs_is_small() -> None:
    names = " ".join(PROJECT["project"]["dependencies"])
    assert not any(heavy in names.split() for heavy in ("torch", "onnx", "tensorrt"))
    assert "torch" not in names


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_every_command_prints_its_version(command: Command, name: str) -> None:
    assert command(name, "--version").stdout == f"{name} {__version__}\n"
