"""How ONNX Runtime fuses products with quantised weights."""

from __future__ import annotations

from collections.abc import Set

from goc_deploy.precision import DYNAMIC_KEY

ROUNDING = "session.qdq_matmulnbits_accuracy_level"  # 1: none; by default to 8 bits, on the CPU


def session_entries(onnx: bytes, dtypes: Set[str]) -> dict[str, str]:
    """Return entries of the configuration of a session.

    Products with weights in blocks keep their activations in the precision, unless the graph asks
    for speed.

    Args:
        onnx: the graph.
        dtypes: dtypes of its initializers.
    """
    entries = {} if _is_dynamic(onnx) else {ROUNDING: "1"}
    if "float8_e4m3fn" in dtypes:
        # Fused products would read float8, for which the CPU provider has no kernel.
        entries["session.disable_quant_qdq"] = "1"
    return entries


def optimizers_in_the_way(onnx: bytes, dtypes: Set[str], provider: str) -> list[str]:
    """Return the optimizers that would make products with quantised weights slower.

    A product of integers and the sum with its bias would become a Gemm, for which ONNX Runtime has
    no kernel that reads integers and returns floats. It would then run in float on dequantised
    values.

    A weight of 8 bits in blocks and its product would become one operator. With float activations,
    its CPU kernel dequantises the weight on every run as the two operators do, and takes up to 1.8
    times as long (weight (1152, 4608), one thread).

    Args:
        onnx: the graph.
        dtypes: dtypes of its initializers.
        provider: ONNX Runtime's name for the provider, such as ``CPU``.
    """
    if b"QuantizeLinear" in onnx:  # not in "DequantizeLinear"
        return ["MatMulAddFusion"]
    in_blocks = "int8" in dtypes and "int4" not in dtypes and not _is_dynamic(onnx)
    return ["QDQSelectorActionTransformer"] if in_blocks and provider == "CPU" else []


def _is_dynamic(onnx: bytes) -> bool:
    return DYNAMIC_KEY.encode() in onnx
