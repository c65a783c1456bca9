"""The weights of a head as a safetensors file beside its plan."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save

from goc_deploy.conditions.tensor_files import arrays_from_safetensors
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.samplers.head import Head
from goc_deploy.samplers.head_features import head_weights

TENSOR = "weights"


def head_to_safetensors(head: Head) -> bytes:
    """Write the weights of a head as tensor ``weights``, (T, F, P) float32."""
    return bytes(save({TENSOR: np.ascontiguousarray(head_weights(head))}))


def weights_from_safetensors(content: bytes | memoryview, where: str) -> np.ndarray:
    """Read a file that `head_to_safetensors` wrote.

    Returns:
        The weights, (T, F, P) float32. `goc_deploy.compiler.check_plan` compares the shape with the
        plan and the model.

    Raises:
        EngineDirError: the file is damaged, has other tensors, or a value is not finite.
    """
    try:
        arrays = arrays_from_safetensors(bytes(content), where)
    except UsageError as cause:
        raise EngineDirError(f"{cause}; add the plan again") from cause
    if arrays.keys() != {TENSOR}:
        names = ", ".join(sorted(arrays)) or "none"
        raise EngineDirError(
            f"{where}: expected one tensor {TENSOR!r}, got {names:.60}; add the plan again"
        )
    weights = arrays[TENSOR]
    if weights.dtype != np.float32 or weights.ndim != 3:
        raise EngineDirError(
            f"{where}: {TENSOR}: expected float32 of 3 dimensions, got {weights.dtype} "
            f"{list(weights.shape)}; add the plan again"
        )
    finite = np.isfinite(weights).all(axis=(1, 2))
    if not finite.all():
        raise EngineDirError(
            f"{where}: {TENSOR}[{finite.argmin()}]: a value is not finite; add the plan again"
        )
    return weights
