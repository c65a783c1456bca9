"""Comparison of plans with their baseline on the same noise and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.errors import UsageError
from goc_deploy.evaluation.sampling import Sampled
from goc_deploy.metrics.estimate import Estimate, mean_estimate
from goc_deploy.metrics.paired import WINDOW, psnr_db, relative_l2, ssim


def computes_everything(plan: Plan) -> bool:
    """Whether a plan caches nothing and corrects nothing."""
    whole = plan.schedule.computed == plan.steps * plan.schedule.units
    return whole and plan.sampler.head is None


def baselines(plans: Sequence[Plan]) -> dict[str, str]:
    """Map each plan to its baseline, the plan that it is compared with.

    The baseline is the first plan that computes everything with the same sampler at the same
    timesteps. If there is none, it is the first plan that computes everything. A baseline is its
    own baseline.

    Raises:
        UsageError: no plan computes everything.
    """
    whole = [plan for plan in plans if computes_everything(plan)]
    if not whole:
        raise UsageError(
            "no plan computes everything, so there is nothing to compare with; add 'none' with "
            "goc-plan"
        )

    def alike(plan: Plan, other: Plan) -> bool:
        tables = plan.sampler, other.sampler
        return tables[0].sampler == tables[1].sampler and tables[0].timesteps == tables[1].timesteps

    return {
        plan.name: next((other for other in whole if alike(plan, other)), whole[0]).name
        for plan in plans
    }


class PairedScores:
    """One number per image and metric of a plan, collected batch by batch."""

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {}
        self._steps: list[np.ndarray] = []

    def add(self, batch: Sampled, expected: Sampled) -> None:
        """Compare a batch with the same batch of the baseline."""
        if batch.latents is not None and expected.latents is not None:
            self.add_values("relative_l2", relative_l2(batch.latents, expected.latents))
        if batch.images is not None and expected.images is not None:
            self.add_values("psnr_db", psnr_db(batch.images, expected.images))
            if min(batch.images.shape[1:3]) >= WINDOW:
                self.add_values("ssim", ssim(batch.images, expected.images))
        x, y = batch.trajectory, expected.trajectory
        if x is not None and y is not None and len(x) == len(y):
            self._steps.append(np.stack([relative_l2(a, b) for a, b in zip(x, y, strict=True)]))

    def add_values(self, metric: str, values: np.ndarray) -> None:
        """Add (n,) numbers of a metric."""
        self._values.setdefault(metric, []).append(values)

    def estimates(self, seed: int) -> dict[str, Estimate]:
        """Return the mean over images of every metric, with its bootstrap interval."""
        return {
            metric: mean_estimate(np.concatenate(parts), seed)
            for metric, parts in self._values.items()
        }

    def step_errors(self) -> list[float] | None:
        """Mean relative L2 of the latents after every step, or None without trajectories."""
        return np.concatenate(self._steps, axis=1).mean(axis=1).tolist() if self._steps else None
