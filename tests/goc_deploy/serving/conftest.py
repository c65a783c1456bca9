"""A server of the demo model and of a model that draws prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.goc_deploy.serving.running import Running


@pytest.fixture(scope="session")
def server(
    demo_engine: Path, prompt_engine_small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    from tests.goc_deploy.serving.running import Running

    folder = tmp_path_factory.mktemp("models")
    (folder / "digits").symlink_to(demo_engine)
    (folder / "prompts").symlink_to(prompt_engine_small)
    backend = ("--backend", "onnxruntime", "--plan", "none", "--plan", "fora:2")
    running = Running(folder / "digits", folder / "prompts", *backend, "--images-per-request", 4)
    running.wait()
    yield running
    code, printed = running.stop()
    assert (code, printed) == (0, "")
