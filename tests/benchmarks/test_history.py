"""The table of the memory of histories, and that docs/performance.md shows it."""

from __future__ import annotations

import pytest

from benchmarks import history
from tests.documents.files import ROOT


def test_the_page_has_the_table_that_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert history.main([]) == 0
    _, printed = capsys.readouterr().out.split("\n", 1)
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    shown = page.split("<!-- history -->")[1].split("<!-- end history -->")[0]
    assert shown.strip() == printed.strip()


def test_sums_do_not_grow_with_the_number_of_units() -> None:
    cells = [history.row(model, "fora:3+gc:0.5,history=computed") for model in history.MODELS]
    # Dual blocks of SD3.5-Medium compute two features of the image at once.
    assert [row[-1].split(":")[0] for row in cells] == ["5", "5", "6", "5", "5", "5"]
    assert [model.spec.units for model in history.MODELS] == [56, 84, 48, 76, 120, 120]
