"""Weights that were quantised elsewhere: float8 with scales is read, other formats are named.

ComfyUI's layout of float8 has a scale beside each weight, and an empty tensor or a description that
marks the file. Weights keep their 8 bits until a unit that reads them is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from goc_deploy.errors import ModelError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MARKER = "scaled_fp8"  # last part of the name of a tensor that marks a file with scales
DESCRIPTION = ".comfy_quant"  # JSON in bytes, which names the format of a layer
# How the scales of NAME.weight end; those of activations are for kernels of float8.
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
# Format -> endings of the names of its tensors, in the order in which they are looked for.
FOREIGN: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes (nf4 or fp4)": (".quant_state.bitsandbytes__nf4", "bitsandbytes__fp4", ".absmax"),
    "bitsandbytes (int8)": (".SCB",),
    "SVDQuant of nunchaku": (".wscales", ".smooth_factor"),
    "GPTQ": (".g_idx",),
    "AWQ": (".qweight", ".qzeros"),
    "nvfp4": (".weight_scale_2",),
    "optimum-quanto": (".weight._data",),
}


def check_not_quantized(names: Iterable[str], where: str) -> None:
    """Check that no tensor belongs to a format of quantised weights that is not read.

    Args:
        names: names of tensors.
        where: what they were read from, for the message.

    Raises:
        ModelError: naming the format and a tensor.
    """
    names = list(names)
    for form, endings in FOREIGN.items():
        mark = next((name for name in names if name.endswith(endings)), None)
        if mark is not None:
            raise refusal(where, form, f"tensor {mark}")


def refusal(where: str, form: str, evidence: str) -> ModelError:
    """The error about a file in a format that is not read."""
    return ModelError(
        f"{where} holds weights in the format {form} ({evidence}), which is not read; give the "
        "weights in float32, float16, bfloat16 or ComfyUI's scaled float8, and add `quantize`"
    )


def is_marker(name: str) -> bool:
    """Whether a tensor has no values of the model, and may be empty."""
    return name.rpartition(".")[2] == MARKER


def with_scales(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take the scales of float8 weights out of the tensors of a file.

    Args:
        tensors: the tensors of a file.
        where: the file, for messages.

    Returns:
        The tensors of the model, and float32 scales of all of them, which were expanded to their
        shapes without a copy; no scales if no tensor is float8. A float8 tensor without a scale has
        the scale 1, unless the file is marked.

    Raises:
        ModelError: a weight has no scale in a marked file, a scale belongs to no float8 weight,
            does not fit it or is no positive number, or a layer has another format than float8.
    """
    marked = any(map(is_marker, tensors))
    scales: dict[str, Tensor] = {}
    model: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = next((name.removesuffix(e) for e in SCALES if name.endswith(e)), None)
        if name.endswith(DESCRIPTION):
            _check_description(name, tensor, where)
        elif layer is not None:
            scales[f"{layer}.weight"] = tensor
        elif not is_marker(name) and not name.endswith(INPUT_SCALES):
            model[name] = tensor
    if not any(tensor.dtype in FLOAT8 for tensor in model.values()):
        if scales:
            raise ModelError(f"{where} has scales, such as of {min(scales)}, but no float8 weights")
        return dict(tensors), {}
    expanded = {}
    for name, tensor in model.items():
        scale = scales.pop(name, None)
        if tensor.dtype in FLOAT8:
            if scale is None and marked and name.endswith(".weight"):
                raise ModelError(
                    f"{where}: {name} is float8 but has no {SCALES[0]}, as all weights of a file "
                    f"with {MARKER} have; download it again"
                )
        elif scale is not None:
            raise ModelError(f"{where}: {name} has a scale but is {_short(tensor.dtype)}")
        expanded[name] = _expanded(torch.ones(()) if scale is None else scale, tensor, name)
    if scales:
        raise ModelError(f"{where}: {min(scales)} has a scale, but there is no such weight")
    return model, expanded


class ScaledTensors(Mapping[str, Tensor]):
    """Tensors of which some are float8 with scales: read in float32, and not kept.

    Args:
        tensors: the tensors.
        scales: scales of the shapes of the tensors, which only those of float8 need.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        self._tensors, self._scales = tensors, scales

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.float().mul_(self._scales[name]) if tensor.dtype in FLOAT8 else tensor


def _expanded(scale: Tensor, tensor: Tensor, name: str) -> Tensor:
    """Scales of the shape of a tensor: one for all values, or one per row."""
    values = scale.float()
    per_row = (tensor.shape[0], *(1,) * (tensor.ndim - 1)) if tensor.ndim else ()
    if values.numel() == 1:
        values = values.reshape(())
    elif values.numel() == tensor.shape[0] and values.shape in ((tensor.shape[0],), per_row):
        values = values.reshape(per_row)
    else:
        raise ModelError(
            f"the scale of {name} is {tuple(scale.shape)}, expected one value, or one per row of "
            f"{tuple(tensor.shape)}"
        )
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ModelError(f"the scale of {name} is not a positive number; download the file again")
    return values.expand(tensor.shape)


def _check_description(name: str, tensor: Tensor, where: str) -> None:
    try:
        form = json.loads(bytes(tensor.tolist()))["format"]
    except (ValueError, TypeError, KeyError) as cause:
        raise ModelError(f"{where}: {name} is not the description of a format") from cause
    if form not in map(_short, FLOAT8):
        raise refusal(where, f"{form!s:.40}", f"tensor {name}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
