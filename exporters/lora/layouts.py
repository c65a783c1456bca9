"""Layouts of LoRA files: from tensor names to one pair of matrices per layer.

diffusers and PEFT name the matrices ``lora_A`` and ``lora_B``, kohya's sd-scripts ``lora_down`` and
``lora_up``. Layers have a prefix, which depends on the program that saved the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from goc_deploy.errors import ModelError

PREFIXES = (
    "base_model.model.",
    "transformer.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
)
TEXT_ENCODERS = ("text_encoder", "lora_te")
# Part of a tensor name -> the kind of change, which is no LoRA of linear layers.
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid.": "a LoRA of convolutions (LoCon)",
    ".lora_embedding_": "a LoRA of an embedding",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".ia3_": "IA3",
    ".vera_lambda_": "VeRA",
    ".processor.": "a LoRA in attention processors, as old versions of diffusers saved it",
}
_PARTS = re.compile(
    r"(?P<layer>.+)\.(?P<part>alpha|lora_[AB](\.default)?\.weight|(lora_|lora\.|lora_linear_layer\.)"
    r"(down|up)\.weight)"
)
_DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")


@dataclass(frozen=True, slots=True)
class Pair:
    """The change of a layer: ``up @ down``, times a factor.

    Attributes:
        down: A, (rank, inputs).
        up: B, (outputs, rank).
        alpha: its own alpha, or None if the file has none for this layer.
    """

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The common dimension of both matrices."""
        return self.down.shape[0]


def is_alpha(name: str) -> bool:
    """Whether a tensor is the alpha of a layer."""
    return name.endswith(".alpha")


def pairs_from_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Pair]:
    """Find the pairs of a file by the name of their layer, without prefixes.

    Args:
        tensors: the tensors of the file.
        where: the file, for messages.

    Raises:
        ModelError: the file is another kind of adapter, or for a text encoder, or a matrix is
            missing or does not fit the other one; the message names the tensor.
    """
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        parts = _PARTS.fullmatch(name)
        if parts is None:
            raise _refusal(name, where)
        layer = _without_prefix(parts["layer"])
        if layer.startswith(TEXT_ENCODERS):
            raise ModelError(
                f"{where} changes a text encoder ({name}), and only the transformer can be "
                "changed; merge it into the folder that you give as `text_encoder`, and remove "
                "these tensors from the LoRA"
            )
        if is_alpha(name):
            alphas[layer] = _alpha(tensor, name, where)
            continue
        matrices = down if parts["part"].startswith(_DOWN) else up
        if layer in matrices:
            raise ModelError(
                f"{where} changes {layer} twice, see {name}; save one LoRA to the file"
            )
        matrices[layer] = tensor
    alone = sorted((down.keys() ^ up.keys()) | (alphas.keys() - down.keys()))
    if alone:
        raise ModelError(
            f"{where}: {alone[0]} has only some of the matrices lora_A and lora_B (or lora_down "
            "and lora_up); download or save it again"
        )
    pairs = {layer: Pair(down[layer], up[layer], alphas.get(layer)) for layer in sorted(down)}
    for layer, pair in pairs.items():
        _check_shapes(layer, pair, where)
    return pairs


def _without_prefix(layer: str) -> str:
    while layer.startswith(PREFIXES):
        layer = layer.removeprefix(next(filter(layer.startswith, PREFIXES)))
    return layer


def _refusal(name: str, where: str) -> ModelError:
    kind = next((kind for part, kind in OTHER_KINDS.items() if part in name), None)
    if kind is None and re.search(r"lora_B\.(default\.)?bias$", name):
        kind = "a LoRA with biases"
    if kind is not None:
        return ModelError(
            f"{where} is {kind} ({name}), and only a LoRA of linear layers can be merged; merge it "
            "with the program that made it, and export the result"
        )
    return ModelError(
        f"{where}: {name!r:.200} is no tensor of a LoRA; known are the layouts of diffusers and "
        "PEFT (lora_A, lora_B) and of kohya (lora_down, lora_up)"
    )


def _alpha(tensor: Tensor, name: str, where: str) -> float:
    value = float(tensor) if tensor.numel() == 1 else torch.nan
    if not 0 < value < torch.inf:
        raise ModelError(f"{where}: {name} must be one positive number; save the LoRA again")
    return value


def _check_shapes(layer: str, pair: Pair, where: str) -> None:
    down, up = tuple(pair.down.shape), tuple(pair.up.shape)
    if len(down) > 2 or len(up) > 2:
        raise ModelError(
            f"{where} is a LoRA of convolutions ({layer} has matrices {down} and {up}), and only a "
            "LoRA of linear layers can be merged; merge it with the program that made it, and "
            "export the result"
        )
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        raise ModelError(
            f"{where}: the matrices of {layer} do not fit together: lora_A is {down}, lora_B is "
            f"{up}, expected (rank, inputs) and (outputs, rank); download or save it again"
        )
