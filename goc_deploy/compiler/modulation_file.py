"""The modulation table of a plan as a safetensors file, for models that it depends on time only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from goc_deploy.compiler.plan import Plan
from goc_deploy.errors import EngineDirError
from goc_deploy.precision import ELEMENT_TYPES, tensor_bytes
from goc_deploy.protocols import NUMPY_DTYPES
from goc_deploy.spec import SECOND_SET

CONDITIONING = "conditioning"
TENSOR = "table"
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of safetensors
_EXPONENT = 0x7F80  # bits of a bfloat16; all of them are set in infinities and NaN


def table_key(plan: Plan) -> str:
    """The digest of all that a table depends on besides weights: plans of one key share a table.

    These are the timesteps in float32, and the step at which the second set of weights begins.
    """
    timesteps = np.asarray(plan.sampler.timesteps, "<f4").tobytes()
    switch = "" if plan.schedule.switch is None else str(plan.schedule.switch)
    return hashlib.sha256(timesteps + switch.encode()).hexdigest()[:32]


def steps_by_graph(plan: Plan) -> Mapping[str, range]:
    """The graphs that compute the table of a plan, and the steps of each."""
    switch = plan.schedule.switch
    if switch is None:
        return {CONDITIONING: range(plan.steps)}
    parts = {CONDITIONING: range(switch), SECOND_SET + CONDITIONING: range(switch, plan.steps)}
    return {name: steps for name, steps in parts.items() if steps}


def table_to_safetensors(table: np.ndarray, dtype: str) -> bytes:
    """Write a table as tensor ``table``.

    Args:
        table: (T, M, D) in ``dtype``; uint16 holds bfloat16 values.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    return _header(table.shape, dtype) + np.ascontiguousarray(table).tobytes()


def table_from_safetensors(
    content: memoryview, shape: tuple[int, int, int], dtype: str, where: str
) -> np.ndarray:
    """View the table in a file that `table_to_safetensors` wrote, without copying it.

    Args:
        content: the file, which the table keeps in memory.
        shape: the expected shape (T, M, D).
        dtype: the expected dtype.
        where: name of the file for messages.

    Returns:
        The table (T, M, D), read-only; uint16 holds bfloat16 values.

    Raises:
        EngineDirError: the file holds something else than one tensor of this shape and dtype, or a
            value is not finite.
    """
    header = _header(shape, dtype)
    start = bytes(content[: len(header)])
    if start != header or len(content) != len(header) + tensor_bytes(dtype, shape):
        raise EngineDirError(
            f"{where}: expected one tensor {TENSOR!r}, {dtype} {list(shape)}, got a file of "
            f"{len(content)} bytes that begins with {start[8:]!r:.99}; export again"
        )
    values = np.frombuffer(content, NUMPY_DTYPES[dtype], offset=len(header))
    table = values.reshape(shape)
    finite = [_is_finite(step, dtype) for step in table]
    if not all(finite):
        raise EngineDirError(
            f"{where}: {TENSOR}[{finite.index(False)}]: a value is not finite; export again"
        )
    return table


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """All bytes before the values: the length of the JSON text, the text, and spaces."""
    place = {
        "dtype": _NAMES[dtype],
        "shape": shape,
        "data_offsets": (0, tensor_bytes(dtype, shape)),
    }
    text = json.dumps({TENSOR: place}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_finite(values: np.ndarray, dtype: str) -> bool:
    if ELEMENT_TYPES[dtype].numpy == "uint16":
        return bool(((values & _EXPONENT) != _EXPONENT).all())
    return bool(np.isfinite(values).all())
