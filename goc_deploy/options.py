"""Options of the main jobs with their defaults, so that command line and library cannot disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]  # (what, done, total)


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export.

    Attributes:
        model: architecture, or ``auto`` to recognise it.
        num_heads: attention heads, where the width does not tell.
        precision: ``fp32``, ``fp16`` or ``bf16``: dtype of weights, tokens and history.
        max_batch: most images per run.
        steps: sampling steps of the plans.
        sampler: sampler SPEC.
        prediction: what the model predicts: ``eps`` (the noise), ``v`` (velocity) or ``x0`` (the clean sample).
        plans: policy SPECs, in order of preference.
        weights: ``ema``, ``model``, or ``auto`` (ema where there is one).
        allow_nonfinite: accept NaN and infinite weights.
        force: replace an existing engine directory.
    """

    model: str = "auto"
    num_heads: int | None = None
    precision: str = "fp32"
    max_batch: int = 16
    steps: int = 20
    sampler: str = "ddim"
    prediction: str = "eps"
    plans: tuple[str, ...] = ("none", "fora:2+gc:1.0")
    weights: str = "auto"
    allow_nonfinite: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build TensorRT engines for an engine directory.

    Attributes:
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        capabilities: GPUs to build for, such as ``8.6``; empty is all that TensorRT-RTX targets from Ampere on, and for
            ``tensorrt`` the GPU of this machine.
        weights: ``embedded``, an engine per unit that holds its weights, or ``shared``, an engine per kind of unit that
            reads them at an address.
        workspace_bytes: most scratch memory of one engine; 0 is no limit.
        plugin: use the plugin where it needs fewer launches.
    """

    backend: str = "tensorrt-rtx"
    capabilities: tuple[str, ...] = ()
    weights: str = "embedded"
    workspace_bytes: int = 0
    plugin: bool = True


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate.

    Attributes:
        seed: of the noise; image i of a request depends on (seed, i) alone.
        cfg_scale: classifier-free guidance scale; 1 is none and runs half the rows.
        cfg_channels: guidance acts on the first channels only, as in DiT's reference; all of them where there are fewer.
    """

    seed: int = 0
    cfg_scale: float = 4.0
    cfg_channels: int = 3


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to compare plans.

    Attributes:
        plans: names or SPECs; the first is the baseline; empty takes all plans of the engine.
        labels: one per image; all images run as one batch.
        cfg_scale: classifier-free guidance scale.
        repeats: measured rounds; every round runs every plan once.
        warmup: rounds that are not measured.
        backend: ``auto`` or ``onnxruntime``.
        threads: 0 is one per core.
    """

    plans: tuple[str, ...] = ()
    labels: tuple[int, ...] = (0,)
    cfg_scale: float = 4.0
    repeats: int = 5
    warmup: int = 1
    backend: str = "auto"
    threads: int = 0
