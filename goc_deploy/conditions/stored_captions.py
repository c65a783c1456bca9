"""The file of the captions that an engine directory stores."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from goc_deploy.conditions.captions import (
    NEGATIVE,
    PROMPT,
    Captions,
    PromptEmbeds,
    prompt_embeds_from_arrays,
)
from goc_deploy.conditions.tensor_files import arrays_from_npz
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.spec import ModelSpec


def captions_to_bytes(embeds: PromptEmbeds) -> bytes:
    """Write captions as an ``.npz`` file, with the first negative caption if there are any."""
    arrays = _arrays(PROMPT, embeds.prompts)
    if embeds.negatives is not None:
        arrays |= _arrays(NEGATIVE, embeds.negatives.chosen(slice(1)))
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _arrays(names: tuple[str, str, str], captions: Captions) -> dict[str, Any]:
    values = captions.embeds, captions.mask, captions.pooled
    return {name: value for name, value in zip(names, values, strict=True) if value.size}


def captions_from_bytes(content: memoryview, spec: ModelSpec, where: str) -> PromptEmbeds:
    """Read a file that `captions_to_bytes` wrote.

    Raises:
        EngineDirError: the content is another, or the number of captions is not that of the spec.
    """
    try:
        embeds = prompt_embeds_from_arrays(arrays_from_npz(io.BytesIO(content), where), spec, where)
    except UsageError as cause:
        raise EngineDirError(
            f"{where} holds no captions for this model ({cause}); export again"
        ) from cause
    if embeds.negatives is None or len(embeds.negatives) != 1:
        raise EngineDirError(f"{where} holds no negative caption; export again")
    if len(embeds.prompts) != spec.choices:
        raise EngineDirError(
            f"{where} holds {len(embeds.prompts)} captions, not {spec.choices}; export again"
        )
    return embeds
