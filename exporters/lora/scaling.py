"""The alpha of a LoRA, from the places in which programs save it.

A layer's change is multiplied by alpha / rank. PEFT saves alpha in ``adapter_config.json``,
diffusers in the metadata of the file, and kohya's sd-scripts as tensors.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1;
rank-stabilised: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
2023.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import HEAD_BYTES, looks_like_safetensors
from goc_deploy.exporters.folders import read_json
from goc_deploy.exporters.lora.layouts import Pair
from goc_deploy.strict_json import parse_json

ADAPTER_CONFIG, PEFT_STEM = "adapter_config.json", "adapter_model"
DIFFUSERS_METADATA = "lora_adapter_metadata"
# Settings of PEFT that do not change what the matrices mean, or that the tensors show.
WITHOUT_EFFECT = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# The other initialisations change the weights of the model too.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Scaling:
    """The alpha of every layer of a file.

    Attributes:
        source: where the alphas come from: ``adapter_config.json``, ``metadata``, or ``rank`` if
            the file has none, so that alpha is the rank.
        alpha: alpha of the layers without one of their own, or None.
        by_layer: name of a layer, or the end of it -> alpha.
        stabilised: divide by the square root of the rank.
    """

    source: str = "rank"
    alpha: float | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False

    def factor(self, layer: str, pair: Pair) -> float:
        """The factor of the change of a layer."""
        own = (
            alpha
            for name, alpha in self.by_layer.items()
            if layer == name.removeprefix("^") or layer.endswith(f".{name}")
        )
        alpha = next(own, self.alpha) if pair.alpha is None else pair.alpha
        divisor = math.sqrt(pair.rank) if self.stabilised else pair.rank
        return (pair.rank if alpha is None else alpha) / divisor


def scaling_of_file(path: Path) -> Scaling:
    """Read the alphas that belong to a LoRA file but are not among its tensors.

    Raises:
        ModelError: a setting is not supported, or a number is out of range.
    """
    metadata = _metadata(path)
    if DIFFUSERS_METADATA in metadata:
        where = f"the metadata of {path}"
        text = metadata[DIFFUSERS_METADATA].encode()
        settings = parse_json(text, where, ModelError)
        prefix = "transformer."
        of_model = {n.removeprefix(prefix): v for n, v in settings.items() if n.startswith(prefix)}
        return _from_settings(of_model or settings, "metadata", where)
    config = path.with_name(ADAPTER_CONFIG)
    if path.stem == PEFT_STEM and config.exists():
        return _from_settings(read_json(config), ADAPTER_CONFIG, str(config))
    return Scaling()


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as opened:
        head = opened.read(HEAD_BYTES)
    if not looks_like_safetensors(path, head):
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as cause:
        raise ModelError(f"{path} is not a sound safetensors file: {cause}") from cause


def _from_settings(settings: Mapping[str, Any], source: str, where: str) -> Scaling:
    """Read the settings of PEFT's LoraConfig.

    Settings that this version does not know are accepted while they are off, because PEFT adds
    them switched off.
    """
    required: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": INITIALISATIONS,
    }
    for name, value in settings.items():
        allowed = required.get(name, (False, None, "", {}, []))
        if name not in WITHOUT_EFFECT and value not in allowed:
            kind = "DoRA" if name == "use_dora" else f"a LoRA with {name} {value!r:.60}"
            raise ModelError(
                f"{where}: this is {kind}, which cannot be merged; merge it with the program that "
                "made it, and export the result"
            )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(
        re.fullmatch(r"\^?[\w.]+", name) for name in patterns
    ):
        raise ModelError(
            f"{where}: alpha_pattern must map names of layers to numbers, without regular "
            "expressions; save the LoRA again"
        )
    alpha = settings.get("lora_alpha")
    return Scaling(
        source,
        None if alpha is None else _number(alpha, f"{where}: lora_alpha"),
        {name: _number(value, f"{where}: alpha_pattern") for name, value in patterns.items()},
        bool(settings.get("use_rslora")),
    )


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ModelError(f"{where} is {value!r:.60}, expected a positive number")
    return number
