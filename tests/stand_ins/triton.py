"""What `triton_python_backend_utils` gives a model inside of Triton, and requests to hand to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"
    UNAVAILABLE, CANCELLED = "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.error = error
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}


class InferenceRequest:
    """A request with rows of texts and numbers; ``cancelled`` answers `is_cancelled`."""

    def __init__(
        self,
        outputs: tuple[str, ...] = ("IMAGES", "LATENTS", "USED_SEED"),
        plan: object = None,
        timeout: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
        **inputs: list[Any],
    ) -> None:
        types = {"SEED": np.uint64, "GUIDANCE_SCALE": np.float32}
        self.tensors = {
            name: Tensor(name, np.array(rows, types.get(name, object)).reshape(-1, 1))
            for name, rows in inputs.items()
        }
        self._outputs, self._timeout, self.is_cancelled = outputs, timeout, cancelled
        self._parameters = "" if plan is None else json.dumps({"plan": plan, "other": 1})

    def requested_output_names(self) -> list[str]:
        return list(self._outputs)

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout

    def request_id(self) -> str:
        return ""


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    values: ClassVar[dict[tuple[str, str], list[float]]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert description.endswith(".")
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        text = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        return Metric(self.kind, self.values.setdefault((self.name, text), []))


class Metric:
    def __init__(self, kind: str, values: list[float]) -> None:
        self._kind, self._values = kind, values

    def increment(self, amount: float) -> None:
        assert self._kind == "counter"
        assert amount >= 0
        self._values.append(amount)

    def set(self, value: float) -> None:
        assert self._kind == "gauge"
        self._values[:] = [value]

    def observe(self, value: float) -> None:
        assert self._kind == "histogram"
        self._values.append(value)


def module() -> ModuleType:
    """The module, with metrics of its own."""
    made = ModuleType("triton_python_backend_utils")
    made.Tensor, made.TritonError = Tensor, TritonError  # type: ignore[attr-defined]
    made.InferenceResponse = InferenceResponse  # type: ignore[attr-defined]
    made.MetricFamily = type("Families", (MetricFamily,), {"values": {}})  # type: ignore[attr-defined]
    made.get_input_tensor_by_name = (  # type: ignore[attr-defined]
        lambda request, name: request.tensors.get(name)
    )
    return made
