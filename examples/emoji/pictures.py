"""The pictures of the emoji, as a model learns them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from captions import CAPTIONS
from torch import Tensor


def load_pictures(path: Path, names: Sequence[str]) -> Tensor:
    """Pictures (N, 3, H, W) float32 in [-1, 1], in the order of the captions.

    Raises:
        ValueError: the file is of other emoji than the captions.
    """
    with np.load(path) as arrays:
        found, images = arrays["names"].tolist(), arrays["images"]
    if found != list(names):
        raise ValueError(f"{path} and {CAPTIONS} are not of the same emoji; run render_pictures.py")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
