"""Reading Learning-to-Cache router files, which are torch pickles, without running their code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import load_file


def router_probabilities(path: str | Path) -> tuple[tuple[float, ...], ...]:
    """The router's probabilities of computing each unit: one row per step, the last step first.

    A file holds the logits of U units: ``{"routers": {"0.prob": (U,), "1.prob": (U,), ...}}``.

    Raises:
        ModelError: the file is unreadable or not a router.
        SafetyError: the file asks to import or call something that is not a tensor.
    """
    path = Path(path)
    content = load_file(path)
    routers = content.get("routers") if isinstance(content, dict) else None
    if not isinstance(routers, dict) or not routers:
        raise ModelError(f"{path} is not a Learning-to-Cache router: it has no 'routers'")
    rows = []
    for i in range(len(routers)):
        row = routers.get(f"{i}.prob")
        if not isinstance(row, Tensor) or row.ndim != 1 or not row.is_floating_point():
            raise ModelError(
                f"{path} is not a Learning-to-Cache router: '{i}.prob' is not a row of numbers"
            )
        probabilities = torch.sigmoid(row.detach().double())
        if not bool(torch.isfinite(probabilities).all()):
            raise ModelError(f"{path}: '{i}.prob' holds NaN; train or download the router again")
        rows.append(tuple(probabilities.tolist()))
    if len({len(row) for row in rows}) != 1:
        raise ModelError(f"{path} is not a Learning-to-Cache router: its rows differ in length")
    return tuple(rows)
