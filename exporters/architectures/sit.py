"""SiT: a DiT that predicts the velocity of a flow.

Its graphs are those of DiT; only the prediction type differs. Its public checkpoints have the names
and shapes of DiT, so SiT is never recognized automatically: ``--model sit`` selects it. diffusers
does not have it.

Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
Interpolant Transformers", ECCV 2024, section 2 (linear path, velocity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.spec import ModelSpec


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, like those of a DiT.

    Raises:
        ModelError: the sizes are not consistent, or the number of heads cannot be inferred.
    """
    return replace(
        DIT.spec_from_tensors(tensors, heads), architecture="sit", prediction_type="flow"
    )


SIT = replace(
    DIT, name="sit", telling_tensors=frozenset(), spec_from_tensors=spec_from_tensors, folder=None
)
