"""How a loaded plan keeps its history: as features of every unit, or as sums of later steps."""

from __future__ import annotations

from dataclasses import replace

from goc_deploy.compiler import Plan, in_form
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import UsageError
from goc_deploy.options import HISTORIES, History
from goc_deploy.precision import DTYPE_OF_PRECISION
from goc_deploy.protocols import Backend
from goc_deploy.runtime.buffers import planned_bytes

# Below this, both forms fit anywhere, and small models run a few percent faster with features.
WORTH_BYTES = 256 * 2**20


def plan_to_run(
    plan: Plan,
    manifest: Manifest,
    backend: Backend,
    images: int,
    history: History = "auto",
    *,
    makes_graphs: bool = False,
) -> Plan:
    """Convert a plan to the form that a backend runs; its ``form_reason`` tells why.

    With ``auto``, sums are used if the buffers of features take more than half of the free memory,
    or if sums save at least ``WORTH_BYTES`` on a backend that runs units one by one. A backend that
    runs many units in a launch would lose these launches.

    Args:
        plan: the plan, as the engine directory stores it.
        manifest: the manifest of the engine directory.
        backend: the backend.
        images: the batch size.
        history: ``features``, ``sums``, or ``auto``.
        makes_graphs: whether graphs can be made that the engine directory lacks.

    Raises:
        UsageError: ``history`` is ``sums``, which the plan cannot have, or is unknown.
    """
    if history not in HISTORIES:
        raise UsageError(f"history must be {', '.join(HISTORIES)}, got {history!r:.60}")
    features = in_form(plan, manifest.model, "device" if backend.stacks else "host")
    if history == "features":
        return replace(features, form_reason="asked for")
    try:
        sums = in_form(plan, manifest.model, "sums")
    except UsageError as cause:
        if history == "sums":
            raise
        return replace(features, form_reason=str(cause))
    if history == "sums":
        return replace(sums, form_reason="asked for")
    taken, reason = _chosen(features, sums, manifest, backend, images)
    if taken is sums and not makes_graphs:
        for signature in sums.signatures:
            if not _runs(signature, manifest, backend):
                taken = features
                reason += (
                    f", but the engine directory lacks the graph {signature!r} of sums; add the "
                    "plan again"
                )
                break
    return replace(taken, form_reason=reason)


def _chosen(
    features: Plan, sums: Plan, manifest: Manifest, backend: Backend, images: int
) -> tuple[Plan, str]:
    """The form that takes less memory where that matters, and why."""
    kept, summed = (
        planned_bytes(manifest.model.largest, manifest.precision, plan, images)
        for plan in (features, sums)
    )
    sizes = f"buffers take {kept / 1e6:.1f} MB with features and {summed / 1e6:.1f} MB with sums"
    free = backend.device.free_bytes()
    if summed < kept and free is not None and 2 * kept > free:
        return sums, f"{sizes}, of {free / 1e6:.1f} MB of free memory"
    if kept - summed >= WORTH_BYTES and not backend.stacks:
        return sums, sizes
    return features, sizes


def _runs(signature: str, manifest: Manifest, backend: Backend) -> bool:
    """Whether a backend can run launches of a signature without making a graph."""
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    return signature in manifest.predict or backend.predict_engine(signature, dtype) is not None
