"""Whether a head is used for what it was fitted for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from goc_deploy.compiler import Plan
from goc_deploy.runtime.weights import Weights

logger = logging.getLogger(__name__)

SCALE_TOLERANCE = 1e-3  # so that a scale that was converted to float32 is not outside


class HeadUse:
    """Warns once for each way in which a plan's head is used outside of what it was fitted for.

    Args:
        plan: the plan.
        weights: the weights of the engines, which may be exchanged.
    """

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._plan, self._weights = plan, weights
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def checked(self, cfg_scales: Sequence[float]) -> dict[str, Any]:
        """Check a request, and log a warning if it is the first of its kind.

        Args:
            cfg_scales: guidance scale of each image; 1 if no channel is guided.

        Returns:
            The entry ``head`` of its report, or nothing without a head.
        """
        head = self._plan.sampler.head
        if head is None:
            return {}
        low, high = head.cfg_scales
        outside = [
            scale
            for scale in cfg_scales
            if not low - SCALE_TOLERANCE <= scale <= high + SCALE_TOLERANCE
        ]
        exchanged = self._exchanged()
        if outside:
            fitted = f"scale {low:g}" if low == high else f"scales {low:g} to {high:g}"
            self._warn(
                "scale",
                f"the head of plan {self._plan.name} was fitted for guidance {fitted}, and is used "
                f"at {outside[0]:g}; its images may be worse than those of the plan without a "
                "head, so fit a plan for this scale",
            )
        if exchanged:
            self._warn(
                "weights",
                f"the head of plan {self._plan.name} was fitted with other weights than those that "
                "are loaded now, so its images may be noise; fit a plan for these weights",
            )
        about = {
            "features": head.form.features,
            "form": head.form.signature,
            "fitted_cfg_scales": [low, high],
            "outside_fitted_cfg_scales": bool(outside),
            "other_weights": exchanged,
        }
        return {"head": about}

    def _exchanged(self) -> bool:
        directory = self._weights.directory
        return (
            directory is not None
            and directory.manifest.provenance.get("checkpoint_sha256")
            != self._weights.checkpoint_sha256
        )

    def _warn(self, kind: str, message: str) -> None:
        with self._lock:
            first = kind not in self._warned
            self._warned.add(kind)
        if first:
            logger.warning(message)
