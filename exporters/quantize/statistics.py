"""What calibration sees of the inputs of products, and the graphs that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from goc_deploy.errors import ModelError, VerificationError
from goc_deploy.exporters.quantize.products import Product

SAMPLED = 32  # rows of a run
MAX_ROWS = 512  # samples that are kept of a product
GOLDEN_RATIO = (1 + 5**0.5) / 2
SUMMARY = 2  # rows of an output before the samples


@dataclass(slots=True)
class InputStatistics:
    """What was seen of the input x (M, K) of a product.

    Attributes:
        largest: (K,) float32 largest absolute values of the channels, over all rows.
        runs: how many runs of the unit were seen.
    """

    largest: np.ndarray
    runs: int = 0
    _samples: list[np.ndarray] = field(default_factory=list)
    _every: int = 1

    @property
    def rows(self) -> np.ndarray:
        """Rows of x that were sampled, (rows, K) float32."""
        return np.concatenate(self._samples)

    def add(self, summary: np.ndarray) -> None:
        """Add the output (SUMMARY + SAMPLED, K) of a run of an `observing_graph`.

        Raises:
            VerificationError: a value is infinite or not a number.
        """
        if not np.isfinite(summary).all():
            raise VerificationError("infinite values or NaN")
        np.maximum(self.largest, summary[0], out=self.largest)
        if self.runs % self._every == 0:
            self._samples.append(summary[SUMMARY:].copy())
        self.runs += 1
        if len(self._samples) * SAMPLED > MAX_ROWS:
            del self._samples[1::2]
            self._every *= 2

    def check(self) -> None:
        """Check that a scale can be made.

        Raises:
            ModelError: nothing was seen but zeros.
        """
        if not self.largest.any():
            raise ModelError("all values were zero, so they have no range")


def output_of(product: Product) -> str:
    """Name of the output of an `observing_graph` for a product."""
    return f"{product.weight}.seen"


def observing_graph(model: onnx.ModelProto, products: Sequence[Product]) -> onnx.ModelProto:
    """Add outputs (SUMMARY + SAMPLED, K) float32 that sum up the input x of every product.

    Row 0 is the largest absolute value of each channel, row 1 the sum of the absolute values, which
    is NaN or infinite if any of them is, and the others are rows of x, at multiples of the golden
    ratio. Equal distances would show one token of every image if there are as many images.

    Args:
        model: the graph of a unit, which is not changed.
        products: products of the graph, from `products_of`.
    """
    seeing = onnx.ModelProto()
    seeing.CopyFrom(model)
    graph, inputs = seeing.graph, {node.output[0]: node.input[0] for node in model.graph.node}
    places = ((np.arange(SAMPLED) * GOLDEN_RATIO) % 1).astype(np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(places, "seen.places"),
            numpy_helper.from_array(np.array([0]), "seen.axis"),
        ]
    )
    for product in products:
        width, name = product.shape[0], output_of(product)
        flat = f"{name}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, width]), flat))
        graph.node.extend(_summing_up(inputs[product.node], flat, name))
        shape = [SUMMARY + SAMPLED, width]
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return seeing


def _summing_up(x: str, shape: str, name: str) -> list[onnx.NodeProto]:
    """The nodes from x to the output of a name; the last one is the output."""

    def node(operator: str, inputs: list[str], part: str, **fields: Any) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [f"{name}.{part}" if part else name], **fields)

    def of(*parts: str) -> list[str]:
        return [f"{name}.{part}" for part in parts]

    return [
        node("Reshape", [x, shape], "flat"),
        node("Cast", of("flat"), "float", to=TensorProto.FLOAT),
        node("Abs", of("float"), "size"),
        node("ReduceMax", [*of("size"), "seen.axis"], "largest", keepdims=1),
        node("ReduceSum", [*of("size"), "seen.axis"], "sum", keepdims=1),
        node("Shape", of("float"), "count", start=0, end=1),
        node("Cast", of("count"), "length", to=TensorProto.FLOAT),
        node("Mul", [*of("length"), "seen.places"], "places"),
        node("Cast", of("places"), "indices", to=TensorProto.INT64),
        node("Gather", of("float", "indices"), "rows", axis=0),
        node("Concat", of("largest", "sum", "rows"), "", axis=0),
    ]
