"""Reading models from folders of diffusers or transformers, without running any code in them.

A folder has a ``config.json`` and weights in one ``.safetensors`` file, in several with an index,
in a ``.bin`` file, or in ``.fp16.safetensors``. Settings that are unknown, or that would change the
arithmetic, are refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
from msgspec import Meta, Struct
from torch import Tensor

from goc_deploy.blocks import MAX_BLOCKS
from goc_deploy.errors import ModelError, SafetyError
from goc_deploy.exporters.checkpoint import load_checkpoint
from goc_deploy.strict_json import bytes_from_file, convert, parse_json

CONFIG, PIPELINE_CONFIG, SCHEDULER_CONFIG = (
    "config.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
)
UNLIMITED = "lambda_min_clipped"  # the one setting of a scheduler that may be -Infinity
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("", ".fp16")
# Settings that change no transformer of this package.
WITHOUT_EFFECT = (
    "_diffusers_version",
    "_name_or_path",
    "dropout",
    "norm_num_groups",
)
MAX_SIZE = 10**5
MAX_GRID = 256  # tokens per side of a position table
MAX_WIDTH = 2**15

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
OLD_CLASS = "Transformer2DModel"  # the class in old files, before each model had its own


Setting = Annotated[int, Meta(ge=1, le=MAX_SIZE)]


class TransformerConfig(Struct, frozen=True, kw_only=True):
    """Sizes that DiT and PixArt share, with the defaults of diffusers."""

    num_attention_heads: Setting = 16
    attention_head_dim: Setting = 72
    in_channels: Setting = 4
    out_channels: int | None = None
    num_layers: Setting = 28
    patch_size: Setting = 2
    sample_size: Setting
    num_embeds_ada_norm: Setting = 1000


ConfigT = TypeVar("ConfigT", bound=Struct)


@dataclass(frozen=True, slots=True)
class Settings(Generic[ConfigT]):
    """The settings that a ``config.json`` may have.

    Attributes:
        kind: the settings that are read, with the defaults of the library.
        required: setting -> the supported values; others would change the arithmetic.
        without_effect: settings that do not change the exported graph.
    """

    kind: type[ConfigT]
    required: Mapping[str, tuple[Any, ...]]
    without_effect: Collection[str] = WITHOUT_EFFECT

    def read(self, config: Mapping[str, Any], where: str) -> ConfigT:
        """Read the settings of a configuration.

        Raises:
            ModelError: a setting is unknown, not supported or out of range; the message names it.
        """
        unknown = sorted(config.keys() - {*self.known, *self.without_effect})
        if unknown:
            raise ModelError(
                f"{where} has a setting {unknown[0]!r} that this version does not know; it may "
                "change the arithmetic"
            )
        for name, allowed in self.required.items():
            actual = config.get(name, allowed[0])
            if not any(type(actual) is type(value) and actual == value for value in allowed):
                raise ModelError(
                    f"{where}: {name} is {actual!r}, only {' or '.join(map(repr, allowed))} is "
                    "supported"
                )
        settings: ConfigT = convert(dict(config), self.kind, where, ModelError)
        return settings

    @property
    def known(self) -> set[str]:
        """Names of the settings that change the model."""
        return {*self.kind.__struct_encode_fields__, *self.required}


def part_of_pipeline(path: Path, part: str, wanted: str) -> Path:
    """Find the folder of a model that a pipeline's folder has, or that was given itself.

    Args:
        path: the folder of a pipeline, or of the model.
        part: name of the model's folder in a pipeline's.
        wanted: ends the advice "give the folder that ...".

    Raises:
        ModelError: the folder has no ``config.json``.
    """
    # os.path, unlike Path, returns False for names that are too long.
    folder = path / part if os.path.exists(path / PIPELINE_CONFIG) else path
    if not os.path.isfile(folder / CONFIG):
        raise ModelError(f"{folder} has no {CONFIG}; give the folder that {wanted}")
    return folder


def is_transformer(config: Mapping[str, Any], own_class: str, norm_type: str) -> bool:
    """Whether a ``config.json`` describes a class; old files have `OLD_CLASS` and a norm type."""
    name = config.get("_class_name")
    return name == own_class or (name == OLD_CLASS and config.get("norm_type") == norm_type)


def predicts_sigma(config: TransformerConfig, where: str) -> bool:
    """Whether a transformer predicts sigma too, by its ``out_channels``.

    Raises:
        ModelError: ``out_channels`` is neither the number of channels nor twice that number.
    """
    channels, predicted = config.in_channels, config.out_channels
    if predicted not in (None, channels, 2 * channels):
        raise ModelError(
            f"{where}: out_channels is {predicted!r}, expected {channels} or {2 * channels} "
            "(with sigma)"
        )
    return predicted == 2 * channels


def transformer_width(config: TransformerConfig, divisor: int, reason: str, where: str) -> int:
    """The width of a transformer, after checking that its sizes are consistent.

    Args:
        config: the sizes of the transformer.
        divisor: the number that must divide the width.
        reason: the reason for the divisor, for messages.
        where: the file, for messages.

    Raises:
        ModelError: a size is not consistent with the others; the message names its setting.
    """
    heads, head = config.num_attention_heads, config.attention_head_dim
    side, patch = config.sample_size, config.patch_size
    width = heads * head
    if side % patch:
        raise ModelError(
            f"{where}: sample_size must be a multiple of patch_size, got {side} and {patch}"
        )
    if side // patch > MAX_GRID:
        raise ModelError(
            f"{where}: sample_size is {side}, at most {MAX_GRID * patch} is supported with "
            f"patch_size {patch}"
        )
    if width % divisor or width > MAX_WIDTH:
        raise ModelError(
            f"{where}: the width, {heads} heads of {head} (num_attention_heads, "
            f"attention_head_dim), must be a multiple of {divisor}, {reason}, and at most "
            f"{MAX_WIDTH}"
        )
    if config.num_layers > MAX_BLOCKS:
        raise ModelError(
            f"{where}: num_layers is {config.num_layers}, at most {MAX_BLOCKS} are supported"
        )
    return width


def read_json(path: Path, constants: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Read a JSON file of a model's folder.

    Args:
        path: the file.
        constants: constants that are not JSON, as in `goc_deploy.strict_json.parse_json`.

    Raises:
        ModelError: the file is unreadable or not a JSON object.
    """
    text = bytes_from_file(path, str(path), ModelError)
    return parse_json(text, str(path), ModelError, constants)


def read_scheduler(path: Path) -> dict[str, Any]:
    """Read the settings of a scheduler.

    diffusers writes ``-Infinity``, which is not JSON, if no limit is set, and uses the same value
    if the setting is missing.

    Raises:
        ModelError: the file is unreadable or not a JSON object, or another setting is infinite.
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
    """Read all tensors of a folder; half-precision files are used only if there are no others.

    Args:
        folder: folder with the weights.
        stem: name of the ``.safetensors`` file or of its index.
        old_stem: name of the ``.bin`` file, if it differs from ``stem``.

    Returns:
        The files that were read, and their tensors by name.

    Raises:
        ModelError: the weights are missing or damaged.
        SafetyError: an index names files outside the folder, or a file asks to run code.
    """
    indices = [folder / f"{stem}.safetensors.index{variant}.json" for variant in VARIANTS]
    whole = [folder / f"{stem}{variant}.safetensors" for variant in VARIANTS]
    old = folder / f"{old_stem or stem}.bin"
    present = [path for path in (indices[0], whole[0], old, indices[1], whole[1]) if path.exists()]
    if not present:
        raise ModelError(
            f"{folder} has neither {whole[0].name}, its index, their {VARIANTS[1]} variants, nor "
            f"{old.name}; download it again"
        )
    index = present[0]
    if index not in indices:
        return [index], dict(load_checkpoint(index).tensors)
    places = convert(read_json(index), _WeightIndex, str(index), ModelError).weight_map
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
                f"{folder / name} does not hold the tensors that {index.name} lists for it, see "
                f"{odd[0]}; download it again"
            )
        tensors |= shard
    return [index, *(folder / name for name in names)], tensors


class _WeightIndex(Struct):
    """An index: tensor name -> file name."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


class Renaming:
    """Renames the tensors of a folder, and reports those that were missing or left over.

    Args:
        tensors: the tensors by their names in the folder.
        where: the folder, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        self.rest, self._where = dict(tensors), where
        self._missing: list[str] = []

    def take_tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Take tensors; ``names`` maps the new names to those in the folder."""
        self._missing += [old for old in names.values() if old not in self.rest]
        return {new: self.rest.pop(old) for new, old in names.items() if old in self.rest}

    def take_layers(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Take weights and biases of layers; ``names`` maps new names to those in the folder."""
        kinds = ("weight", "bias")
        return self.take_tensors(
            {f"{new}.{kind}": f"{old}.{kind}" for new, old in names.items() for kind in kinds}
        )

    def take_joined(self, new: str, parts: Sequence[str]) -> dict[str, Tensor]:
        """Take layers as one, joined along the first dimension of their weights and biases."""
        state = {}
        for kind in ("weight", "bias"):
            tensors = list(self.take_tensors({part: f"{part}.{kind}" for part in parts}).values())
            same = len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1
            state[f"{new}.{kind}"] = torch.cat(tensors) if same else torch.empty(0)
        return state

    def finish(self) -> None:
        """Check that no tensor was missing and none is left over.

        Raises:
            ModelError: a tensor was missing or is left over; the message lists up to ten.
        """
        for names, what in ((self._missing, "missing"), (sorted(self.rest), "unexpected")):
            if names:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise ModelError(
                    f"{self._where}: the weights are not those of {CONFIG}; {len(names)} tensors "
                    f"{what}: {shown}"
                )
