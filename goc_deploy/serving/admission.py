"""From a request to a ticket: every check that needs no engine."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Mapping

from goc_deploy.cancellation import call_limits
from goc_deploy.errors import UsageError
from goc_deploy.runtime import arguments
from goc_deploy.serving.hosted import HostedPlan, LoadedModel
from goc_deploy.serving.queue import Ticket
from goc_deploy.serving.requests import ImageRequest, ServiceLimits, check_images, check_texts


def admitted(
    request: ImageRequest, models: Mapping[str, LoadedModel], limits: ServiceLimits
) -> Ticket:
    """Check a request; its prompts are encoded later.

    Raises:
        UsageError: it does not fit the model or the limits.
    """
    model = models.get(request.model)
    if model is None:
        raise UsageError(
            f"there is no model {request.model!r:.60}; this service has {', '.join(models)}"
        )
    plan, drawing = model.plan(request.plan), None
    check_texts(request, limits)
    key = _compatible(request, plan)
    if request.prompts is None:
        drawing = plan.pipeline.drawing(
            request.labels,
            seed=request.seed,
            cfg_scale=request.cfg_scale,
            cfg_channels=request.cfg_channels,
            guidance=request.guidance,
            cfg_scale_2=request.cfg_scale_2,
        )
        images = len(drawing)
    else:
        images = len(request.prompts if request.labels is None else request.labels)
    check_images(images, limits)
    return Ticket(
        request,
        request.request_id or uuid.uuid4().hex,
        plan,
        images,
        key,
        drawing,
        call_limits(request.deadline, request.cancel),
    )


def _compatible(request: ImageRequest, plan: HostedPlan) -> Hashable:
    """Equal for requests that can run together."""
    spec = plan.pipeline.spec
    second = arguments.second_scale(request.cfg_scale_2, spec)
    _, channels, guided = arguments.guidance(request.cfg_scale, request.cfg_channels, spec, second)
    return (
        plan.model,
        plan.name,
        channels,
        guided,
        arguments.embedded_guidance(request.guidance, spec),
        second,
    )
