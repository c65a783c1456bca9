from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command
from tests.goc_deploy.sharded.series import SERIES, sha256


@pytest.fixture(scope="session")
def single_process_sha256(
    demo_engine: Path, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Digest of the file that goc-run writes without shards."""
    output = tmp_path_factory.mktemp("single") / "samples.npz"
    command("goc-run", demo_engine, *SERIES, "--output", output)
    return sha256(output)
