"""Reading models from folders that diffusers or transformers saved, without running anything that stands in them.

A folder has a ``config.json`` and weights in one ``.safetensors`` file, in several with an index, in a ``.bin`` file, or in
``.fp16.safetensors``.
Settings that are not known, or that would change the arithmetic, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goc_deploy.errors import ModelError, SafetyError
from goc_deploy.exporters.checkpoint import load_checkpoint
from goc_deploy.schedule import MAX_BLOCKS
from goc_deploy.strict_json import bytes_from_file, parse_json

CONFIG, PIPELINE_CONFIG, SCHEDULER_CONFIG = (
    "config.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
)
UNLIMITED = "lambda_min_clipped"  # the setting of a scheduler that may be -Infinity
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("", ".fp16")
WITHOUT_EFFECT = (
    "_diffusers_version",
    "_name_or_path",
    "dropout",
    "norm_num_groups",
)  # on any transformer here
MAX_SIZE = 10**5
MAX_GRID = 256  # tokens per side, of which a position table is made
MAX_WIDTH = 2**15

TRANSFORMER_SIZES = {  # of DiT and PixArt alike; the side of the latents differs
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
TRANSFORMER_REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "upcast_attention": (False,),
    "attention_type": ("default",),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "num_vector_embeds": (None,),
}
OLD_CLASS = "Transformer2DModel"  # what old files say in place of a class of its own


@dataclass(frozen=True, slots=True)
class Settings:
    """What may stand in a ``config.json``.

    Attributes:
        sizes: whole numbers, with what the library takes where they are missing.
        required: setting -> the values that this project computes; others would change the arithmetic.
        read: settings that the caller reads itself.
        without_effect: settings that change nothing here.
    """

    sizes: Mapping[str, int]
    required: Mapping[str, tuple[Any, ...]]
    read: Collection[str] = ()
    without_effect: Collection[str] = WITHOUT_EFFECT

    def check(self, config: Mapping[str, Any], where: str) -> dict[str, int]:
        """The sizes of a configuration.

        Raises:
            ModelError: naming the setting that is unknown, not supported or out of range.
        """
        unknown = sorted(
            config.keys() - {*self.sizes, *self.required, *self.read, *self.without_effect}
        )
        if unknown:
            raise ModelError(
                f"{where} has a setting {unknown[0]!r} that this version does not know; it may change the arithmetic"
            )
        for name, allowed in self.required.items():
            found = config.get(name, allowed[0])
            if not any(type(found) is type(value) and found == value for value in allowed):
                raise ModelError(
                    f"{where}: {name} is {found!r}, only {' or '.join(map(repr, allowed))} is supported"
                )
        found_sizes = {name: config.get(name, default) for name, default in self.sizes.items()}
        for name, value in found_sizes.items():
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise ModelError(f"{where}: {name} must be a whole number from 1 on, got {value!r}")
        return found_sizes


def is_transformer(config: Mapping[str, Any], own_class: str, norm_type: str) -> bool:
    """Whether a ``config.json`` is of a class; old files name `OLD_CLASS`, and the norm tells."""
    name = config.get("_class_name")
    return name == own_class or (name == OLD_CLASS and config.get("norm_type") == norm_type)


def transformer_width(size: Mapping[str, int], divisor: int, reason: str, where: str) -> int:
    """The width of a transformer, whose sizes fit each other.

    Args:
        size: what `Settings.check` returned.
        divisor: of the width,
        reason: and what it is for.
        where: for messages.

    Raises:
        ModelError: naming the setting that does not fit.
    """
    heads, head = size["num_attention_heads"], size["attention_head_dim"]
    side, patch, layers = size["sample_size"], size["patch_size"], size["num_layers"]
    width = heads * head
    if side % patch:
        raise ModelError(
            f"{where}: sample_size must be a multiple of patch_size, got {side} and {patch}"
        )
    if side // patch > MAX_GRID:
        raise ModelError(
            f"{where}: sample_size is {side}, at most {MAX_GRID * patch} is supported with patch_size {patch}"
        )
    if width % divisor or width > MAX_WIDTH:
        raise ModelError(
            f"{where}: the width, {heads} heads of {head} (num_attention_heads, attention_head_dim), must be a multiple of {divisor}, "
            f"{reason}, and at most {MAX_WIDTH}"
        )
    if layers > MAX_BLOCKS:
        raise ModelError(f"{where}: num_layers is {layers}, at most {MAX_BLOCKS} are supported")
    return width


def predicts_sigma(
    config: Mapping[str, Any], channels: int, default: int | None, where: str
) -> bool:
    """Whether ``out_channels`` (``default`` where it is missing) says that a transformer predicts sigma too.

    Raises:
        ModelError: neither once nor twice the channels.
    """
    predicted = config.get("out_channels", default)
    if predicted not in (None, channels, 2 * channels):
        raise ModelError(
            f"{where}: out_channels is {predicted!r}, expected {channels} or {2 * channels} (with sigma)"
        )
    return bool(predicted == 2 * channels)


def read_json(path: Path, constants: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A JSON object of a model's folder; ``constants`` as in `goc_deploy.strict_json.parse_json`.

    Raises:
        ModelError: unreadable or not a JSON object.
    """
    return parse_json(
        bytes_from_file(path, str(path), ModelError), str(path), ModelError, constants
    )


def read_scheduler(path: Path) -> dict[str, Any]:
    """The settings of a scheduler.

    diffusers writes ``-Infinity``, which is no JSON, where no limit is set, and takes the same where the setting is missing.

    Raises:
        ModelError: unreadable, not a JSON object, or another setting is infinite.
    """
    settings = read_json(path, {"-Infinity": -math.inf})
    if settings.get(UNLIMITED) == -math.inf:
        del settings[UNLIMITED]
    for name, value in settings.items():
        numbers = [
            number
            for number in (value if isinstance(value, list) else [value])
            if isinstance(number, float)
        ]
        if any(map(math.isinf, numbers)):
            raise ModelError(f"{path}: {name} is infinite; it must be a finite number")
    return settings


def read_weights(
    folder: Path, stem: str = DIFFUSERS_WEIGHTS, old_stem: str | None = None
) -> tuple[list[Path], dict[str, Tensor]]:
    """The files that hold the weights, and every tensor in them; of half precision only where there is nothing else.

    Args:
        folder: where they lie.
        stem: name of the ``.safetensors`` file or of its index.
        old_stem: name of the ``.bin`` file, where that differs.

    Raises:
        ModelError: missing or damaged.
        SafetyError: an index that names files outside the folder, or a file that asks to run code.
    """
    indices = [folder / f"{stem}.safetensors.index{variant}.json" for variant in VARIANTS]
    whole = [folder / f"{stem}{variant}.safetensors" for variant in VARIANTS]
    old = folder / f"{old_stem or stem}.bin"
    present = [path for path in (indices[0], whole[0], old, indices[1], whole[1]) if path.exists()]
    if not present:
        raise ModelError(
            f"{folder} has neither {whole[0].name}, its index, their {VARIANTS[1]} variants, nor {old.name}; download it again"
        )
    index = present[0]
    if index not in indices:
        return [index], dict(load_checkpoint(index).tensors)
    places = read_json(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
        raise ModelError(f"{index} has no weight_map from tensors to files; download it again")
    tensors: dict[str, Tensor] = {}
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise SafetyError(
                f"{index} names a file outside its folder: {name!r}; do not use this folder"
            )
        shard = load_checkpoint(folder / name).tensors
        listed = {tensor for tensor, file in places.items() if file == name}
        if shard.keys() != listed:
            odd = sorted(shard.keys() ^ listed)
            raise ModelError(
                f"{folder / name} does not hold the tensors that {index.name} lists for it, see {odd[0]}; download it again"
            )
        tensors |= shard
    return [index, *(folder / name for name in names)], tensors


class Renaming:
    """Takes tensors out of a folder's weights under other names, and says in the end what was missing or left over."""

    def __init__(self, found: Mapping[str, Tensor], where: Path) -> None:
        self.rest, self._where = dict(found), where
        self._missing: list[str] = []

    def take_tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors: name here -> name there."""
        self._missing += [old for old in names.values() if old not in self.rest]
        return {new: self.rest.pop(old) for new, old in names.items() if old in self.rest}

    def take_layers(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Weights and biases of layers: name here -> name there."""
        kinds = ("weight", "bias")
        return self.take_tensors(
            {f"{new}.{kind}": f"{old}.{kind}" for new, old in names.items() for kind in kinds}
        )

    def take_joined(self, new: str, parts: Sequence[str]) -> dict[str, Tensor]:
        """Layers that are one here, joined along the first dimension of their weights and biases."""
        state = {}
        for kind in ("weight", "bias"):
            tensors = list(self.take_tensors({part: f"{part}.{kind}" for part in parts}).values())
            same = len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1
            state[f"{new}.{kind}"] = torch.cat(tensors) if same else torch.empty(0)
        return state

    def finish(self) -> None:
        """Check that everything was there and nothing is left.

        Raises:
            ModelError: listing up to ten tensors.
        """
        for names, what in ((self._missing, "missing"), (sorted(self.rest), "unexpected")):
            if names:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise ModelError(
                    f"{self._where}: the weights are not those of {CONFIG}; {len(names)} tensors {what}: {shown}"
                )
