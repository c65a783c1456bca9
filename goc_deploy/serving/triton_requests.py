"""Requests and responses of Triton's Python backend, as requests and results of a service."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from goc_deploy.cancellation import CancelToken
from goc_deploy.conditions.labels import labels_from_text
from goc_deploy.errors import (
    CancelledError,
    DeadlineError,
    GocError,
    NotReadyError,
    OverloadedError,
    UsageError,
)
from goc_deploy.runtime.arguments import checked_scale
from goc_deploy.runtime.results import Result
from goc_deploy.serving.hosted import LoadedModel
from goc_deploy.serving.requests import DEFAULTS, ImageRequest

LABEL, PROMPT, NEGATIVE_PROMPT = "LABEL", "PROMPT", "NEGATIVE_PROMPT"
SEED, GUIDANCE_SCALE = "SEED", "GUIDANCE_SCALE"
IMAGES, LATENTS, USED_SEED = "IMAGES", "LATENTS", "USED_SEED"
CODES = (  # the first class that fits; DeadlineError is what Triton's own queue answers then
    (UsageError, "INVALID_ARG"),
    (CancelledError, "CANCELLED"),
    (DeadlineError, "UNAVAILABLE"),
    (NotReadyError, "UNAVAILABLE"),
    (OverloadedError, "UNAVAILABLE"),
)


def image_request(
    request: Any, pb_utils: Any, name: str, model: LoadedModel, cancel: CancelToken
) -> ImageRequest:
    """Convert a request; each row of its inputs is an image.

    Args:
        request: an ``InferenceRequest`` with inputs (rows, 1).
        pb_utils: the module ``triton_python_backend_utils``.
        name: name of the model in the service.
        model: the model.
        cancel: token of the request.

    Raises:
        UsageError: an input is missing, too short or not UTF-8, or a value is out of range.
    """

    def rows(input_name: str) -> list[Any] | None:
        tensor = pb_utils.get_input_tensor_by_name(request, input_name)
        return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()

    labels = prompts = None
    negatives: Sequence[str] = ("",)
    if model.takes == "class":
        names = model.directory.manifest.class_names
        labels = [_label(text, names) for text in _texts(rows(LABEL), LABEL)]
    else:
        prompts = _texts(rows(PROMPT), PROMPT)
        if (given := rows(NEGATIVE_PROMPT)) is not None:
            negatives = _texts(given, NEGATIVE_PROMPT)
    images = len(labels or prompts or ())
    seeds = _one_per_image(SEED, rows(SEED), images)
    scales = _one_per_image(GUIDANCE_SCALE, rows(GUIDANCE_SCALE), images)
    timeout = request.timeout()  # microseconds; 0 is none
    return ImageRequest(
        name,
        _plan(request.parameters()),
        labels=labels,
        prompts=prompts,
        negative_prompts=negatives,
        seed=[secrets.randbits(32) for _ in range(images)] if seeds is None else seeds,
        cfg_scale=DEFAULTS.cfg_scale if scales is None else checked_scale(scales, GUIDANCE_SCALE),
        deadline=timeout / 1e6 if timeout else None,
        cancel=cancel,
        request_id=request.request_id() or None,
    )


def response(request: Any, pb_utils: Any, wanted: ImageRequest, result: Result) -> Any:
    """An ``InferenceResponse`` with the outputs that a request asks for.

    Raises:
        VerificationError: an image is not finite.
    """
    if result.errors:
        raise next(iter(result.errors.values()))
    outputs = {
        IMAGES: result.images,
        LATENTS: result.latents,
        USED_SEED: np.array(wanted.seed, np.uint64).reshape(-1, 1),
    }
    asked = request.requested_output_names()
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.ascontiguousarray(array))
            for name, array in outputs.items()
            if name in asked and array is not None
        ]
    )


def error_response(pb_utils: Any, error: BaseException) -> Any:
    """An ``InferenceResponse`` with an error."""
    text = str(error) if isinstance(error, GocError) else f"{type(error).__name__}: {error}"
    code = next((code for kind, code in CODES if isinstance(error, kind)), "INTERNAL")
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
    )


def _one_per_image(name: str, rows: list[Any] | None, images: int) -> list[Any] | None:
    if rows is not None and len(rows) != images:
        raise UsageError(f"the request has {len(rows)} rows of {name} for {images} images")
    return rows


def _texts(rows: Sequence[Any] | None, name: str) -> list[str]:
    if rows is None:
        raise UsageError(f"the request has no input {name}")
    texts: list[str] = []
    for row, text in enumerate(rows):
        try:
            texts.append(text.decode("utf-8") if isinstance(text, bytes) else str(text))
        except UnicodeDecodeError as cause:
            raise UsageError(f"row {row} of {name} is not UTF-8") from cause
    return texts


def _label(text: str, class_names: Sequence[str]) -> int:
    labels = labels_from_text(text, class_names)
    if len(labels) != 1:
        raise UsageError(f"a row of {LABEL} is one class, by name or number, got {text!r:.60}")
    return labels[0]


def _plan(parameters: str) -> str | None:
    """The plan that the parameters of a request name, or None.

    Other parameters are ignored: Triton adds its own, and headers if it is told to.

    Raises:
        UsageError: the plan is no text.
    """
    plan = json.loads(parameters or "{}").get("plan")
    if plan is not None and not isinstance(plan, str):
        raise UsageError(f"the parameter plan is the name of a plan, got {plan!r:.60}")
    return plan
