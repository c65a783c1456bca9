"""diffusers without cache, cache-dit with a mask of steps, and plans of goc_deploy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.peers.model import PeerModel
from benchmarks.work import Outcome, Work, sampled
from goc_deploy.api import load_plans
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.schedule import Schedule

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

UNCACHED, CACHED = "none", "fora:2"
PLANS = (UNCACHED, CACHED, f"{CACHED}+gc:0.5", f"{CACHED}+lagrange:1")
DIFFUSERS, OURS = "diffusers none", f"goc_deploy {UNCACHED}"
TAYLOR_ORDER = 1
REUSE, TAYLORSEER = "cache-dit mask", f"cache-dit mask, TaylorSeer {TAYLOR_ORDER}"
# Blocks that cache-dit computes at every step: the fewest that it accepts.
FIRST_BLOCKS = 1


@dataclass(frozen=True, slots=True)
class PeerContender:
    """Something that does the work.

    Attributes:
        name: short, unique.
        uncached: name of its own run without cache.
        run: does the work.
        computed: share of the block evaluations that are computed, once it has run.
    """

    name: str
    uncached: str
    run: Callable[[Work], Outcome]
    computed: Callable[[], float]


class BlockCounter:
    """Counts the calls of a transformer's blocks, in which most of the time is spent."""

    def __init__(self, transformer: nn.Module) -> None:
        self.blocks, self.calls = list(transformer.transformer_blocks), 0
        for block in self.blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def share(self, steps: int) -> float:
        """Calls since the last reset, of those that compute everything."""
        return self.calls / (steps * len(self.blocks))


def mask_of(schedule: Schedule) -> list[int]:
    """cache-dit's mask of a schedule: 1 for a step that computes every unit, 0 for none.

    Raises:
        ValueError: a step computes some units only.
    """
    mask = []
    for step, row in enumerate(schedule.coefficients):
        reused = [bool(coefficients) for coefficients in row]
        if any(reused) != all(reused):
            raise ValueError(f"step {step} computes some units only, which no mask of steps does")
        mask.append(0 if all(reused) else 1)
    return mask


def diffusers_uncached(model: PeerModel) -> PeerContender:
    """The transformer of diffusers in the plain sampling loop."""
    return _of_transformer(DIFFUSERS, model, model.transformer(), lambda: None)


def cache_dit_masked(model: PeerModel, mask: list[int], *, taylor: bool) -> PeerContender:
    """cache-dit with a static mask of steps, which has 1 for a step that is computed.

    At the other steps it predicts the residual of the blocks after the first, by TaylorSeer or as
    that of the last computed step.
    """
    import cache_dit

    transformer = model.transformer()
    adapter = cache_dit.BlockAdapterRegister.get_adapter(transformer)
    if adapter is None:  # its table has the pipeline of Stable Diffusion 3 only, by this pattern
        adapter = cache_dit.BlockAdapter(
            transformer=transformer,
            blocks=transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        )
    # cache-dit 1.5.3 fails if it is to predict the text of Stable Diffusion 3, whose last block
    # returns none. Nothing reads the text after the blocks.
    taylorseer = cache_dit.TaylorSeerCalibratorConfig(
        taylorseer_order=TAYLOR_ORDER, enable_encoder_calibrator=False
    )
    cache_dit.enable_cache(
        adapter,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=FIRST_BLOCKS,
            Bn_compute_blocks=0,
            enable_separate_cfg=False,
            num_inference_steps=len(mask),
            steps_computation_mask=mask,
            steps_computation_policy="static",
        ),
        calibrator_config=taylorseer if taylor else None,
    )
    name = TAYLORSEER if taylor else REUSE
    return _of_transformer(name, model, transformer, lambda: cache_dit.refresh_context(transformer))


def _of_transformer(
    name: str, model: PeerModel, transformer: nn.Module, begin: Callable[[], object]
) -> PeerContender:
    predict, counter = model.predict(transformer), BlockCounter(transformer)

    def run(work: Work) -> Outcome:
        begin()
        counter.calls = 0
        return sampled(predict, work)

    return PeerContender(name, DIFFUSERS, run, lambda: counter.share(model.work.table.steps))


def goc_deploy_plans(model: PeerModel) -> Iterator[PeerContender]:
    """The plans of the engine directory, on one set of weights."""
    pipes = load_plans(model.engine, PLANS, batch_size=len(model.work.labels))
    for plan, pipe in zip(PLANS, pipes, strict=True):
        yield PeerContender(
            f"goc_deploy {plan}", OURS, _runner(pipe, model), lambda p=pipe: _computed(p)
        )


def _runner(pipe: Pipeline, model: PeerModel) -> Callable[[Work], Outcome]:
    def run(work: Work) -> Outcome:
        chosen = {"prompt_embeds": model.captions} if model.captions else {"labels": work.labels}
        done = pipe.generate(
            **chosen,
            cfg_scale=work.cfg_scale,
            cfg_channels=work.noise.shape[1],
            latents=work.noise,
            decode=False,
        )
        step_ms = tuple(step["ms"] for step in done.report["batches"][0]["steps"])
        return Outcome(done.latents, step_ms, done.report["total_ms"])

    return run


def _computed(pipe: Pipeline) -> float:
    return pipe.plan.schedule.computed / (pipe.plan.steps * pipe.spec.units)
