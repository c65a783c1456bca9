"""Qwen-Image-Edit: a Qwen-Image that also reads the tokens of the images to edit.

The tensors are those of a Qwen-Image. The latents of the reference images, from the encoder of the
VAE, follow those of the noise as further frames. The captions come from Qwen2.5-VL, which sees the
images too, so they are long.

Source: Qwen Team, "Qwen-Image Technical Report", 2025, section 4, and the loops of diffusers'
``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from goc_deploy.exporters.architectures.qwen import QWEN_IMAGE
from goc_deploy.exporters.architectures.references import (
    kinds_with_references,
    reading_references,
    without_references,
)
from goc_deploy.exporters.units import GraphKind
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

NAME = "qwen-image-edit"
GRID = (64, 64)  # of images of 1024x1024 pixels, the size to which the pipelines bring references
TOKENS = 2048  # of a caption; an image of that size has up to 1369


def edit_spec(spec: ModelSpec) -> ModelSpec:
    """The model that edits, of the sizes of a Qwen-Image."""
    spec = replace(spec, architecture=NAME, grid=GRID, max_grid=GRID, caption_tokens=TOKENS)
    return reading_references(spec)


def plain_spec(spec: ModelSpec) -> ModelSpec:
    """The Qwen-Image of the same tensors."""
    return replace(without_references(spec), architecture=QWEN_IMAGE.name)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    return edit_spec(QWEN_IMAGE.spec_from_tensors(tensors, heads))


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    assert QWEN_IMAGE.folder is not None
    return edit_spec(QWEN_IMAGE.folder.spec_from_config(config, where))


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    QWEN_IMAGE.check_tensors(tensors, plain_spec(spec))


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a Qwen-Image-Edit, in the order in which they are written.

    Raises:
        UsageError: the precision is fp16.
    """
    plain = QWEN_IMAGE.graph_kinds(plain_spec(spec), precision)
    return kinds_with_references(plain, spec, precision)


assert QWEN_IMAGE.folder is not None
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    name=NAME,
    telling_tensors=frozenset(),
    spec_from_tensors=spec_from_tensors,
    check_tensors=check_tensors,
    graph_kinds=graph_kinds,
    folder=replace(
        QWEN_IMAGE.folder,
        pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        spec_from_config=spec_from_config,
    ),
)
