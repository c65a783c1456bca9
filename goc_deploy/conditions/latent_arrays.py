"""Latents that a caller gives, as float32 arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from goc_deploy.errors import UsageError


def array_of_latents(values: Any, subject: str) -> np.ndarray:
    """Convert an argument to an array of any dtype.

    Args:
        values: the argument.
        subject: its name with a verb, for the message, such as ``latents are``.

    Raises:
        UsageError: it cannot be converted.
    """
    try:
        return np.asarray(values)
    except Exception as cause:  # an object may raise anything when it is converted to an array
        raise UsageError(
            f"{subject} no array: {cause}; for a tensor of torch use "
            "latents.detach().float().numpy()"
        ) from cause


def float32_of_latents(values: np.ndarray, subject: str) -> np.ndarray:
    """Convert floating-point values to float32.

    Args:
        values: the array.
        subject: its name with a verb, for the message, such as ``latents hold``.

    Raises:
        UsageError: a value is NaN or infinite, or does not fit.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise UsageError(f"{subject} NaN or infinite values, or such that float32 cannot hold")
    return narrow
