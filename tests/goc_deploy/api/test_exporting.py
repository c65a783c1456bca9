"""What an export refuses before it reads the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from goc_deploy.api.exporting import export_with
from goc_deploy.errors import ConflictError
from goc_deploy.options import ExportOptions


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_not_ours_is_refused_before_the_checkpoint_is_read(
    force: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for name in ("mine", "mine/notes.txt"):
        with pytest.raises(ConflictError, match="exists and is not"):
            export_with(tmp_path / "no.pt", tmp_path / name, ExportOptions(force=force))
