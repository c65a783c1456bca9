"""Reading LoRA files, and fitting them to the layers of a model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from goc_deploy.engine_dir.manifest import LoraEntry
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.contract import Architecture
from goc_deploy.exporters.checkpoint import check_values, load_checkpoint
from goc_deploy.exporters.lora.layouts import Pair, is_alpha, pairs_from_tensors
from goc_deploy.exporters.lora.merging import Addition
from goc_deploy.exporters.lora.scaling import PEFT_STEM, scaling_of_file
from goc_deploy.exporters.units import Slab
from goc_deploy.spec import ModelSpec

# Files in the folders of PEFT and of diffusers.
FILES = tuple(
    f"{stem}.{suffix}"
    for stem in (PEFT_STEM, "pytorch_lora_weights")
    for suffix in ("safetensors", "bin")
)
SHOWN_LAYERS = 5


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that fits the model.

    Attributes:
        entry: what the manifest records.
        additions: what is added to the tensors of the checkpoint.
    """

    entry: LoraEntry
    additions: tuple[Addition, ...]


def read_loras(
    texts: Sequence[str],
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    architecture: Architecture,
) -> tuple[Lora, ...]:
    """Read LoRA files and fit them to a model.

    Args:
        texts: ``FILE`` or ``FILE:SCALE`` each.
        tensors: the tensors of the checkpoint, in the public layout.
        spec: sizes of the model.
        architecture: the family of the model.

    Returns:
        The LoRAs by ascending digest, so that sums do not depend on the order of ``texts``.

    Raises:
        UsageError: a scale is no number other than 0, or a LoRA is given twice.
        ModelError: a file is unreadable, not a LoRA of linear layers, or does not fit the model.
        SafetyError: a file asks to run code.
    """
    layers = _layers(tensors, spec, architecture) if texts else {}
    loras: dict[str, Lora] = {}
    for text in texts:
        path, scale = _path_and_scale(text)
        lora = _read(path, scale, tensors, layers, spec.architecture)
        twin = loras.setdefault(lora.entry.sha256, lora)
        if twin is not lora:
            raise UsageError(
                f"`loras={text}` is the same LoRA as {twin.entry.file}; give it once, with the sum "
                "of both scales"
            )
    return tuple(loras[digest] for digest in sorted(loras))


def digest_of_merge(checkpoint_sha256: str, loras: Sequence[Lora]) -> str:
    """The digest that identifies the weights: that of the checkpoint if there are no LoRAs."""
    if not loras:
        return checkpoint_sha256
    lines = [checkpoint_sha256]
    for lora in loras:
        factors = " ".join(repr(addition.factor) for addition in lora.additions)
        lines.append(f"{lora.entry.sha256} {lora.entry.scale!r} {factors}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _path_and_scale(text: str) -> tuple[Path, float]:
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Path(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(
            f"`loras={text}`: the scale must be a finite number other than 0, got {number!r:.60}"
        )
    return Path(path), scale


def _file(path: Path) -> Path:
    """The file with the weights: the path itself, or one in the folder."""
    if not os.path.isdir(path):
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path} has no {' and no '.join(FILES)}; give the file of the LoRA")


def _layers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, architecture: Architecture
) -> dict[str, Slab]:
    """Every name of a linear layer in a LoRA -> the rows of its weight.

    Names are those of the public layout and those of diffusers, and both with underscores in place
    of dots, as kohya's sd-scripts has them.
    """
    weights = {name.removesuffix(".weight"): name for name in tensors if name.endswith(".weight")}
    slabs = {layer: Slab(name) for layer, name in weights.items() if tensors[name].ndim == 2}
    joined = {} if architecture.folder is None else architecture.folder.layers(spec)
    for layer, parts in joined.items():
        if layer not in slabs:
            continue
        name = slabs[layer].key
        rows = tensors[name].shape[0] // len(parts)
        slabs |= {part: Slab(name, i * rows, (i + 1) * rows) for i, part in enumerate(parts)}
    return slabs | {layer.replace(".", "_"): slab for layer, slab in slabs.items()}


def _read(
    path: Path,
    scale: float,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Slab],
    family: str,
) -> Lora:
    file = load_checkpoint(_file(path))
    pairs = pairs_from_tensors(file.tensors, str(file.path))
    matrices = {name: tensor for name, tensor in file.tensors.items() if not is_alpha(name)}
    check_values(replace(file, tensors=matrices))
    scaling = scaling_of_file(file.path)
    odd = [layer for layer in pairs if layer not in layers]
    if odd:
        shown = ", ".join(odd[:SHOWN_LAYERS])
        raise ModelError(
            f"{file.path} does not fit this {family}: {len(odd)} of the {len(pairs)} layers that "
            f"it changes are no linear layers that the export has by themselves ({shown}); give a "
            "LoRA of this model"
        )
    for layer, pair in pairs.items():
        _check_fit(layer, pair, layers[layer], tensors, str(file.path))
    sources = {scaling.source if pair.alpha is None else "tensors" for pair in pairs.values()}
    entry = LoraEntry(
        file=file.path.name if file.path == path else f"{path.name}/{file.path.name}",
        sha256=file.sha256,
        scale=scale,
        alpha_source=", ".join(sorted(sources)),
        ranks=tuple(sorted({pair.rank for pair in pairs.values()})),
        layers=len(pairs),
    )
    additions = tuple(
        Addition(layers[layer], pair.down, pair.up, scale * scaling.factor(layer, pair))
        for layer, pair in pairs.items()
        # Adding zeros would turn -0.0 into 0.0, so that the weights would not stay the same.
        if bool(pair.up.any()) and bool(pair.down.any())
    )
    return Lora(entry, additions)


def _check_fit(
    layer: str, pair: Pair, slab: Slab, tensors: Mapping[str, Tensor], where: str
) -> None:
    outputs, inputs = tensors[slab.key][slab.start : slab.stop].shape
    changed = (pair.up.shape[0], pair.down.shape[1])
    if changed != (outputs, inputs):
        raise ModelError(
            f"{where} does not fit this model: {layer} has {outputs} outputs and {inputs} inputs, "
            f"the LoRA is for {changed[0]} and {changed[1]}; give a LoRA of this model"
        )
