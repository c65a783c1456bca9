"""The blocks that skip-layer guidance leaves out, as part of the model that is exported."""

from __future__ import annotations

from dataclasses import replace

from goc_deploy.errors import UsageError
from goc_deploy.spec import ModelSpec


def with_skip_guidance(spec: ModelSpec, layers: tuple[int, ...]) -> ModelSpec:
    """The model with rows for skip-layer guidance, if any layers are given.

    Raises:
        UsageError: the model has no such blocks, a block is given twice, all are given, or images
            share the rows of the modulation table, so that no image can have gates of its own.
    """
    if not layers:
        return spec
    if spec.one_modulation or spec.guidance_norm != "none":
        raise UsageError(
            f"`skip_guidance_layers` is for models whose modulation depends on the image, such as "
            f"Stable Diffusion 3, and not for {spec.architecture}; leave it out"
        )
    wrong = [layer for layer in layers if not 0 <= layer < spec.depth]
    if wrong:
        raise UsageError(
            f"`skip_guidance_layers` has block {wrong[0]}, but this model has the blocks 0 to "
            f"{spec.depth - 1}; leave it out"
        )
    distinct = sorted(set(layers))
    if len(distinct) < len(layers) or len(distinct) == spec.depth:
        raise UsageError(
            f"`skip_guidance_layers` must be different blocks, and not all {spec.depth}, got "
            f"{', '.join(map(str, layers))}"
        )
    return replace(spec, skip_guidance_layers=tuple(distinct))
