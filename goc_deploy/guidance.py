"""The default guidance scales, and skip-layer guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from goc_deploy.options import SkipGuidance
from goc_deploy.spec import ModelSpec

Scales = TypeVar("Scales")

CFG_SCALE = 4.0  # of models with classifier-free guidance
EMBEDDED_GUIDANCE = 3.5  # as in FluxPipeline
SKIP_START, SKIP_STOP = 0.01, 0.2  # of the number of steps, as in StableDiffusion3Pipeline
DEFAULT_SCALES = "4.0, or 1.0 for a distilled model"  # for help texts


@dataclass(frozen=True, slots=True)
class SkipLayerGuidance:
    """Guidance away from the output of the model without some of its blocks.

    In some steps, ``scale * (cond - skipped)`` is added to the guided output, where ``skipped`` is
    the conditional output of the model without the blocks of `ModelSpec.skip_guidance_layers`.

    Attributes:
        scale: weight of the difference.
        steps: the steps that it acts in, consecutive and not empty.

    Source: the loop of diffusers' ``StableDiffusion3Pipeline``.
    """

    scale: float
    steps: range


def skip_window(given: SkipGuidance) -> tuple[float, float, float]:
    """The scale of skip-layer guidance, and the shares of the steps where it starts and stops."""
    return given if isinstance(given, tuple) else (given, SKIP_START, SKIP_STOP)


def cfg_scale_of(given: Scales | None, spec: ModelSpec) -> Scales | float:
    """The classifier-free guidance scale of a call.

    Its default is `CFG_SCALE`. It is 1 for a distilled model and for one with embedded guidance,
    which were trained to draw guided images without unconditional rows.

    Args:
        given: what the caller gave, or None.
        spec: the model.
    """
    if given is not None:
        return given
    return 1.0 if spec.distilled or spec.embedded_guidance else CFG_SCALE
