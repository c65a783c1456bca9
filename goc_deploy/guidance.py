"""The default guidance scales."""

from __future__ import annotations

from typing import TypeVar

from goc_deploy.spec import ModelSpec

Scales = TypeVar("Scales")

CFG_SCALE = 4.0  # of models with classifier-free guidance
EMBEDDED_GUIDANCE = 3.5  # as in FluxPipeline
DEFAULT_SCALES = "4.0, or 1.0 for a distilled model"  # for help texts


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
