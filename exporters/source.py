"""What an export reads: a model, LoRAs and companions, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.contract import Architecture
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.checkpoint import (
    Checkpoint,
    load_checkpoint,
    of_diffusion_model,
    of_float8,
)
from goc_deploy.exporters.companions.attach import Companions, read_companions
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import Lora, read_loras
from goc_deploy.exporters.model_folder import FolderModel, read_model_folder
from goc_deploy.exporters.quantized_files import ScaledTensors
from goc_deploy.exporters.sample_sizes import spec_for_sizes
from goc_deploy.exporters.skip_guidance import with_skip_guidance
from goc_deploy.exporters.weight_sets import split_sets
from goc_deploy.options import ExportOptions
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Source:
    """What an export reads.

    Attributes:
        model: what the checkpoint holds.
        architecture: its family.
        spec: sizes of the model as it is exported.
        tensors: the weights in the public layout, with the LoRAs.
        loras: the LoRAs.
        companions: VAE, text encoders and captions.
    """

    model: FolderModel
    architecture: Architecture
    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    loras: tuple[Lora, ...]
    companions: Companions

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The weights of the model, then those of its companions."""
        return (self.model.checkpoint, *self.companions.checkpoints)


def read_source(path: Path, options: ExportOptions) -> Source:
    """Read what is exported, and check that it goes together.

    Args:
        path: a checkpoint file, or a folder that diffusers saved.
        options: export options.

    Raises:
        ModelError, SafetyError: the checkpoint, a LoRA or a companion is not usable.
        UsageError: options do not go together, or with the model.
    """
    model = read_model(path, options)
    checkpoint, spec = model.checkpoint, with_caption_tokens(model.spec, options.caption_tokens)
    architecture = ARCHITECTURES[spec.architecture]
    if spec.boundary and options.loras:
        raise UsageError(
            "`loras` are not supported for a model with two sets of weights; merge each into its "
            "transformer before the export"
        )
    for of_set in split_sets(checkpoint.tensors) if spec.boundary else [checkpoint.tensors]:
        architecture.check_tensors(of_set, spec)
    loras = read_loras(options.loras, checkpoint.tensors, spec, architecture)
    scaled = ScaledTensors(checkpoint.tensors, checkpoint.scales)
    tensors = MergedTensors(scaled, [a for lora in loras for a in lora.additions])
    companions = read_companions(options, spec)
    spec, pixels = companions.scaled(spec)
    spec = spec_for_sizes(spec, tensors, architecture, options, pixels)
    if spec.text_conditional:
        spec = replace(spec, choices=companions.labels)
    if spec.max_references and spec.choices:
        raise UsageError(
            "`captions` are not stored for a model that edits images, because each goes with its "
            "reference images; leave them out, and give prompt embeddings with each run"
        )
    spec = with_skip_guidance(spec, options.skip_guidance_layers)
    return Source(model, architecture, spec, tensors, tuple(loras), companions)


def read_model(path: Path, options: ExportOptions) -> FolderModel:
    """Read a checkpoint file, or a folder that diffusers saved.

    Raises:
        ModelError, SafetyError: the checkpoint is not usable.
        UsageError: an option does not go with it.
    """
    if options.model not in ("auto", *ARCHITECTURES):
        raise ModelError(
            f"`model={options.model}` is unknown; this version has {', '.join(ARCHITECTURES)}"
        )
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        whole = load_checkpoint(path, options.weights)
        checkpoint, spec = _recognise(of_float8(of_diffusion_model(whole)), options)
        return FolderModel(
            checkpoint,
            replace(spec, prediction_type=options.prediction or spec.prediction_type),
            (),
            None,
        )
    wanted = (
        ARCHITECTURES if options.model == "auto" else {options.model: ARCHITECTURES[options.model]}
    )
    model = read_model_folder(path, wanted, options.prediction)
    if options.num_heads not in (None, model.spec.heads):
        raise UsageError(
            f"`num_heads={options.num_heads}`: the configuration in {path} says {model.spec.heads}"
        )
    if options.weights != "auto":
        raise UsageError(
            f"`weights={options.weights}` is for training checkpoints; {path} holds one "
            "set of weights"
        )
    return model


def with_caption_tokens(spec: ModelSpec, tokens: int | None) -> ModelSpec:
    """The model with this number of tokens for each caption; None keeps its own.

    Raises:
        UsageError: the model reads no captions, or fewer tokens.
    """
    if tokens in (None, spec.caption_tokens):
        return spec
    if not spec.text_conditional:
        raise UsageError("`caption_tokens`: a class-conditional model reads no captions")
    if not 1 <= tokens <= spec.caption_tokens:
        raise UsageError(
            f"`caption_tokens={tokens}`: this model reads at least 1 and at most "
            f"{spec.caption_tokens}"
        )
    if tokens % spec.token_multiple:
        raise UsageError(
            f"`caption_tokens={tokens}`: this model pads captions to a multiple of "
            f"{spec.token_multiple} tokens, so it must be one"
        )
    return replace(spec, caption_tokens=tokens)


def _recognise(checkpoint: Checkpoint, options: ExportOptions) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint in the public layout of its family, and the sizes of the model."""
    names = list(checkpoint.tensors)
    for name, architecture in ARCHITECTURES.items():
        tensors = architecture.in_public_layout(checkpoint.tensors)
        matches = architecture.matches(list(tensors))
        if options.model == name or (options.model == "auto" and matches):
            spec = architecture.spec_from_tensors(tensors, options.num_heads)
            scales = architecture.in_public_layout(checkpoint.scales)
            return replace(checkpoint, tensors=tensors, scales=scales), spec
    raise ModelError(
        f"{checkpoint.path} is not a model that this version knows ({', '.join(ARCHITECTURES)}); "
        f"it has tensors such as {', '.join(names[:3])}"
    )
