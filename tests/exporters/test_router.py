from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from goc_deploy.errors import ModelError, SafetyError
from goc_deploy.exporters.router import router_probabilities
from tests.conftest import GOLDEN


def test_logits_become_probabilities_in_file_order(tmp_path: Path) -> None:
    rows = {"1.prob": torch.tensor([0.0]), "0.prob": torch.nn.Parameter(torch.tensor([2.0]))}
    torch.save({"routers": rows}, tmp_path / "r.pt")
    assert router_probabilities(tmp_path / "r.pt") == (
        (pytest.approx(1 / (1 + math.exp(-2.0))),),
        (0.5,),
    )


def test_the_published_layout_with_training_arguments_is_read() -> None:
    assert [len(row) for row in router_probabilities(GOLDEN / "router.pt")] == [8] * 20


class _RunsCode:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"weight": torch.zeros(2)}, ModelError, "has no 'routers'"),
        ({"routers": {}}, ModelError, "has no 'routers'"),
        ({"routers": {"1.prob": torch.zeros(2)}}, ModelError, "'0.prob' is not a row of numbers"),
        (
            {"routers": {"0.prob": torch.zeros(2, 2)}},
            ModelError,
            "'0.prob' is not a row of numbers",
        ),
        ({"routers": {"0.prob": torch.tensor([math.nan])}}, ModelError, "'0.prob' holds NaN"),
        (
            {"routers": {"0.prob": torch.zeros(2), "1.prob": torch.zeros(3)}},
            ModelError,
            "rows differ in length",
        ),
        (
            {"routers": {"0.prob": torch.zeros(2)}, "args": _RunsCode()},
            SafetyError,
            "asks to run code",
        ),
    ],
)
def test_what_is_no_router_is_refused(
    content: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "r.pt")
    with pytest.raises(error, match=message):
        router_probabilities(tmp_path / "r.pt")
