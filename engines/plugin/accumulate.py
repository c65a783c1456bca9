"""An accumulate graph as one launch of the kernel, without ONNX and without TensorRT."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.compiler.plan import MAX_TAPS
from goc_deploy.engines.plugin.kernel import DTYPES, VECTOR_BYTES, Geometry, Kernels
from goc_deploy.engines.plugin.predict import PredictKernel, check_names, check_shapes
from goc_deploy.errors import EngineDirError
from goc_deploy.precision import DTYPE_BYTES
from goc_deploy.protocols import Buffer, Engine, Run, Stream


class TapsParameters(ctypes.Structure):
    """``GocTaps`` of ``accumulate.cu``."""

    _fields_ = (
        ("feature", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("taps", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("gates", ctypes.c_void_p * MAX_TAPS),
        ("before", ctypes.c_void_p * MAX_TAPS),
        ("after", ctypes.c_void_p * MAX_TAPS),
    )


def accumulate_geometry(shape: Sequence[int], dtype: str, addresses: Sequence[int]) -> Geometry:
    """Choose the access width: sixteen bytes if rows and addresses allow it, else one element.

    Args:
        shape: (B, T, D).
        dtype: dtype of all tensors but the coefficients.
        addresses: addresses of these tensors.
    """
    rows, tokens, hidden = shape
    vector = VECTOR_BYTES // DTYPE_BYTES[dtype]
    if hidden % vector or any(address % VECTOR_BYTES for address in addresses):
        return Geometry(f"goc_accumulate_{dtype}_single", rows * tokens * hidden)
    return Geometry(f"goc_accumulate_{dtype}_vector", rows * tokens * hidden // vector)


class AccumulateKernel:
    """See `goc_deploy.protocols.Engine`.

    Inputs: g (B, T, D), coefficients (taps,) float32, gate{tap} (B, D), and a{tap} (B, T, D) of
    those taps that do not start their accumulator. Outputs: a{tap}_out, which may share the memory
    of a{tap}.

    Args:
        signature: signature of the launch, see `goc_deploy.compiler.plan.Accumulate.signature`.
        dtype: dtype of every tensor but the coefficients, one of ``DTYPES``.
        kernels: the kernels to launch.

    Raises:
        EngineDirError: the signature is wrong, or no kernel serves its launch.
    """

    def __init__(self, signature: str, dtype: str, kernels: Kernels) -> None:
        assert dtype in DTYPES
        starts = taps_from_signature(signature)
        if starts is None or len(starts) > MAX_TAPS:
            raise EngineDirError(
                f"{signature!r} is not an accumulate signature of 1 to {MAX_TAPS} taps"
            )
        self._signature, self._starts, self._kernels = signature, starts, kernels
        taps = range(len(starts))
        self._gates = [f"gate{tap}" for tap in taps]
        self._before = [f"a{tap}" for tap in taps if not starts[tap]]
        self._outputs = [f"a{tap}_out" for tap in taps]
        names = ["g", "coefficients", *self._gates, *self._before, *self._outputs]
        self.dtypes: Mapping[str, str] = {
            name: "float32" if name == "coefficients" else dtype for name in names
        }

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        """See `goc_deploy.protocols.Engine.bind`; the stream and every output are required.

        Raises:
            EngineDirError: a name is missing or unknown, or a dtype or a shape does not fit.
        """
        assert stream is not None, "a kernel has no stream of its own"
        expected = self.dtypes.keys() - set(self._outputs)
        check_names(self._signature, "input", expected, inputs)
        check_names(self._signature, "output", self._outputs, outputs)
        buffers = {**inputs, **outputs}
        shape, dtype = inputs["g"].shape, self.dtypes["g"]
        shapes: dict[str, tuple[int, ...]] = {"coefficients": (len(self._starts),)}
        if len(shape) == 3:
            shapes |= dict.fromkeys(self._gates, (shape[0], shape[2]))
        check_shapes(self._signature, buffers, shape, shapes, self.dtypes)
        addresses = [b.pointer for name, b in buffers.items() if name != "coefficients"]
        geometry = accumulate_geometry(shape, dtype, addresses)
        parameters = TapsParameters(
            inputs["g"].pointer, inputs["coefficients"].pointer, *shape, len(self._starts), 0
        )
        for tap, starts in enumerate(self._starts):
            parameters.gates[tap] = inputs[f"gate{tap}"].pointer
            parameters.before[tap] = None if starts else inputs[f"a{tap}"].pointer
            parameters.after[tap] = outputs[f"a{tap}_out"].pointer
        kernels, handle, keep_alive = self._kernels, stream.handle, (dict(inputs), dict(outputs))

        def run(_: Any = keep_alive) -> None:
            kernels.launch(geometry, parameters, handle)

        return run


def kernel_from_signature(signature: str, dtype: str, kernels: Kernels) -> Engine:
    """Return the kernel of a launch that predicts or accumulates.

    Raises:
        EngineDirError: the signature is wrong, or no kernel serves its launch.
    """
    kind = PredictKernel if taps_from_signature(signature) is None else AccumulateKernel
    return kind(signature, dtype, kernels)
