"""A predict graph as one launch of the kernel, without ONNX and without TensorRT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from goc_deploy.engines.plugin.kernel import (
    DTYPES,
    Kernels,
    Stack,
    geometry,
    parameters_from_addresses,
    stack_from_signature,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.protocols import Buffer, Run, Stream


class PredictKernel:
    """See `goc_deploy.protocols.Engine`.

    Inputs: x (B, T, D), gates (units, B, D), coefficients (rows of all units, concatenated)
    float32, and each unit's history ``g{unit}_{entry}`` (B, T, D). Outputs: x_out, and ``g{unit}``
    of the units that store. x_out may share the memory of x, and a stored prediction that of an
    entry which its own or an earlier unit reads.

    Args:
        signature: signature of the launch, see `goc_deploy.compiler.plan.Predict.signature`.
        dtype: dtype of every tensor but the coefficients, one of ``DTYPES``.
        kernels: the kernels to launch.

    Raises:
        EngineDirError: the signature is wrong, or no kernel serves its launch.
    """

    def __init__(self, signature: str, dtype: str, kernels: Kernels) -> None:
        assert dtype in DTYPES
        self._signature, self._kernels = signature, kernels
        self._stack = stack = stack_from_signature(signature)
        histories = [
            f"g{unit}_{entry}"
            for unit, entries in enumerate(stack.entries)
            for entry in range(entries)
        ]
        self._inputs = ("x", "gates", "coefficients", *histories)
        self._outputs = (
            "x_out",
            *(f"g{unit}" for unit, stores in enumerate(stack.stores) if stores),
        )
        self.dtypes: Mapping[str, str] = {
            name: "float32" if name == "coefficients" else dtype
            for name in (*self._inputs, *self._outputs)
        }

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        """See `goc_deploy.protocols.Engine.bind`; the stream and every output are required.

        Raises:
            EngineDirError: a name is missing or unknown, a dtype or a shape does not fit, or an
                output shares the memory of an input that is read later.
        """
        assert stream is not None, "a kernel has no stream of its own"
        check_names(self._signature, "input", self._inputs, inputs)
        check_names(self._signature, "output", self._outputs, outputs)
        shape = inputs["x"].shape
        self._check_tensors({**inputs, **outputs}, shape)
        self._check_order(inputs, outputs)
        addresses = (
            [inputs[name].pointer for name in self._inputs],
            [outputs[name].pointer for name in self._outputs],
        )
        launch_geometry = geometry(shape, inputs["x"].dtype, *addresses)
        parameters = parameters_from_addresses(self._stack, shape, *addresses)
        kernels, handle, keep_alive = self._kernels, stream.handle, (dict(inputs), dict(outputs))

        def run(_: Any = keep_alive) -> None:
            kernels.launch(launch_geometry, parameters, handle)

        return run

    def _check_tensors(self, buffers: Mapping[str, Buffer], shape: tuple[int, ...]) -> None:
        shapes: dict[str, tuple[int, ...]] = {"coefficients": (sum(self._stack.entries),)}
        if len(shape) == 3:
            shapes["gates"] = (self._stack.units, shape[0], shape[2])
        check_shapes(self._signature, buffers, shape, shapes, self.dtypes)

    def _check_order(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Check that no earlier unit stores on a history entry that the kernel reads later."""
        last_read = {inputs[name].pointer: unit for unit, name in _histories(self._stack)}
        for unit, stores in enumerate(self._stack.stores):
            if stores and last_read.get(outputs[f"g{unit}"].pointer, unit) > unit:
                raise EngineDirError(
                    f"launch {self._signature!r} stores g{unit} on an entry that unit "
                    f"{last_read[outputs[f'g{unit}'].pointer]} reads; compile the plan again"
                )


def _histories(stack: Stack) -> list[tuple[int, str]]:
    """Return each unit with the names of its entries, in the order in which they are read."""
    return [
        (unit, f"g{unit}_{entry}")
        for unit, entries in enumerate(stack.entries)
        for entry in range(entries)
    ]


def check_names(
    signature: str, kind: str, expected: Collection[str], bound: Mapping[str, Buffer]
) -> None:
    """Check that exactly the expected tensors are bound.

    Args:
        signature: the launch.
        kind: ``input`` or ``output``.
        expected: names of the tensors.
        bound: what is bound.

    Raises:
        EngineDirError: a name is missing or unknown.
    """
    for name in sorted(bound.keys() ^ set(expected)):
        state = "does not have" if name in bound else "needs"
        raise EngineDirError(
            f"launch {signature!r} {state} {kind} {name!r}; compile the plan again"
        )


def check_shapes(
    signature: str,
    buffers: Mapping[str, Buffer],
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
) -> None:
    """Check shape and dtype of every tensor.

    Args:
        signature: the launch.
        buffers: the tensors by name.
        shape: (B, T, D) of features.
        shapes: the shapes of those tensors that are no features.
        dtypes: the dtype of every tensor.

    Raises:
        EngineDirError: one does not fit.
    """
    for name, buffer in buffers.items():
        expected = shapes.get(name, shape)
        if len(shape) != 3 or buffer.shape != expected or buffer.dtype != dtypes[name]:
            raise EngineDirError(
                f"launch {signature!r} takes {name} as {dtypes[name]} "
                f"{list(expected)} where x is (B, T, D), but the plan binds {buffer.dtype} "
                f"{list(buffer.shape)}; export again"
            )
