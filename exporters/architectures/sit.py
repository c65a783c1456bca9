"""SiT: a DiT that predicts the velocity of a flow. Its units are the DiT's; what differs is what the sampler makes of them.

Its public checkpoints have the DiT's names and shapes, so it is never recognised: ``--model sit`` says it.
Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", ECCV
2024, section 2 (linear path, velocity).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import dit
from goc_deploy.exporters.architectures.dit import check_tensors, unit_kinds
from goc_deploy.spec import ModelSpec

__all__ = [
    "PIPELINES",
    "check_tensors",
    "describes",
    "matches",
    "spec_from_config",
    "spec_from_tensors",
    "state_from_diffusers",
    "unit_kinds",
]

PIPELINES: tuple[str, ...] = ()
NO_FOLDERS = "diffusers has no SiT; give a checkpoint in its public layout"


def matches(names: Sequence[str]) -> bool:  # noqa: ARG001 (of the contract)
    """A SiT looks like a DiT."""
    return False


def describes(config: Mapping[str, Any]) -> bool:  # noqa: ARG001 (of the contract)
    """diffusers has no SiT."""
    return False


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """The sizes of a DiT.

    Raises:
        ModelError: sizes that do not fit each other, or heads that cannot be known.
    """
    return replace(dit.spec_from_tensors(tensors, heads), architecture="sit", prediction="flow")


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:  # noqa: ARG001 (of the contract)
    """diffusers has no SiT."""
    raise ModelError(f"{where}: {NO_FOLDERS}")


def state_from_diffusers(
    found: Mapping[str, Tensor],  # noqa: ARG001 (of the contract)
    spec: ModelSpec,  # noqa: ARG001
    where: Path,
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """diffusers has no SiT."""
    raise ModelError(f"{where}: {NO_FOLDERS}")
