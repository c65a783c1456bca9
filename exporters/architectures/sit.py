"""SiT: a DiT that predicts the velocity of a flow.

Its units are the DiT's; what differs is what the sampler makes of their output. Its public checkpoints have the DiT's
names and shapes, so it is never recognised: ``--model sit`` names it. diffusers does not have it.

Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
ECCV 2024, section 2 (linear path, velocity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.spec import ModelSpec


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """The sizes of a DiT.

    Raises:
        ModelError: sizes that do not fit each other, or a number of heads that cannot be known.
    """
    return replace(DIT.spec_from_tensors(tensors, heads), architecture="sit", prediction="flow")


SIT = replace(
    DIT, name="sit", telling_tensors=frozenset(), spec_from_tensors=spec_from_tensors, folder=None
)
