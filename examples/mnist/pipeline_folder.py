"""The folder of a pipeline of diffusers without its encoders, as goc-export reads it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any


def save_pipeline(name: str, transformer: Any, scheduler: Any, folder: Path) -> None:
    """Write a transformer in float16 and a scheduler.

    Args:
        name: class of the pipeline.
        transformer: a model of diffusers.
        scheduler: a scheduler of diffusers.
        folder: to write to.
    """
    index: dict[str, Any] = {"_class_name": name}
    for part, saved in (
        ("scheduler", scheduler),
        ("transformer", copy.deepcopy(transformer).half()),
    ):
        saved.save_pretrained(folder / part)
        index[part] = ["diffusers", type(saved).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
