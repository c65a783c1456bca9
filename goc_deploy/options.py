"""Options of the main jobs and their defaults, which the commands and the library share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from goc_deploy.precision import Precision

Progress = Callable[[str, int, int], None]  # (name of the job, done, total)


# Far from the small seeds that people generate with, so that calibration images stay unseen.
CALIBRATION_SEED = 2**32
Segments = Literal["full", "none"]
SEGMENTS: tuple[Segments, ...] = get_args(Segments)
WeightMode = Literal["embedded", "shared"]  # how a TensorRT engine holds its weights
CheckpointWeights = Literal["auto", "ema", "model"]
PRESETS = ("paper",)  # tables of the literature that goc-eval reproduces


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        model: architecture, or ``auto`` to detect it.
        num_heads: number of attention heads; None infers it from the width.
        precision: ``fp32``, ``fp16`` or ``bf16``: number format of weights, tokens and history.
        max_batch: largest number of images per run.
        steps: number of sampling steps of the plans.
        sampler: sampler SPEC. None takes ``diffusers``, the scheduler of the model's folder. If
            there is no folder, it takes ``euler`` for a model that predicts a flow, and ``ddim``
            for others.
        prediction: prediction type, one of `goc_deploy.spec.PREDICTIONS`. None takes that of the
            folder's scheduler, or of the architecture if there is no folder.
        plans: policy SPECs, in order of preference; empty takes `default_plans`.
        calibrate: number of images that calibrated policies learn from; None takes
            `goc_deploy.policies.calibration.default_images`.
        calibration_seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images.
        weights: ``ema``, ``model``, or ``auto`` (``ema`` if the checkpoint has it).
        allow_nonfinite: accept NaN and infinite weights.
        force: replace an existing engine directory.
        captions: captions that a text-conditional model uses instead of class labels: a file of
            prompt embeddings, or of prompts (``.txt``, one per line, with a text encoder). None
            takes `goc_deploy.conditions.text.DEFAULT_PROMPTS` if there is a text encoder.
        text_encoder: folder of the T5 encoder that the model was trained with, or None.
        vae: folder of the AutoencoderKL whose decoder turns latents into images, or None.
        vae_tile: side of a decoder tile in latent pixels; larger latents are decoded in tiles.
        segments: as `PlanOptions.segments`, for the plans of the export.
    """

    model: str = "auto"
    num_heads: int | None = None
    precision: Precision = "fp32"
    max_batch: int = 16
    steps: int = 20
    sampler: str | None = None
    prediction: str | None = None
    plans: tuple[str, ...] = ()
    calibrate: int | None = None
    calibration_seed: int = CALIBRATION_SEED
    cfg_scale: float = 4.0
    weights: CheckpointWeights = "auto"
    allow_nonfinite: bool = False
    force: bool = False
    captions: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    vae_tile: int = 64
    segments: Segments = "full"


def default_plans(*, calibrates: bool) -> tuple[str, ...]:
    """Return the default SPECs.

    Calibration is impossible for bf16 engines (no CPU kernels) and for text-conditional models
    without captions. These get a gradient of 0.5, which no tested sampler amplifies.
    """
    return ("none", "fora:2+goc" if calibrates else "fora:2+gc:0.5")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of a plan that is added to an engine directory.

    Attributes:
        name: the plan's name; None takes the SPEC, made safe for a file name.
        steps: number of sampling steps; None takes that of the first plan.
        sampler: sampler SPEC; None takes that of the first plan.
        calibrate: number of images that a calibrated policy learns from; None takes
            `goc_deploy.policies.calibration.default_images`.
        seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images.
        segments: what TensorRT runs as one engine: ``full``, all units of a full step, or
            ``none``. ONNX Runtime always runs single units.
    """

    name: str | None = None
    steps: int | None = None
    sampler: str | None = None
    calibrate: int | None = None
    seed: int = CALIBRATION_SEED
    cfg_scale: float = 4.0
    segments: Segments = "full"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of the TensorRT engines of an engine directory.

    Attributes:
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        capabilities: compute capabilities to build for, such as ``8.6``. Empty takes the GPU of
            this machine for ``tensorrt``, and for ``tensorrt-rtx`` all that it targets from Ampere
            on.
        weights: ``embedded``, one engine per unit that contains its weights, or ``shared``, one
            engine per kind of unit that reads the weights at an address.
        workspace_bytes: limit on the scratch memory of one engine; 0 is no limit.
        plugin: use the plugin for graphs that need fewer launches with it.
    """

    backend: str = "tensorrt-rtx"
    capabilities: tuple[str, ...] = ()
    weights: WeightMode = "embedded"
    workspace_bytes: int = 0
    plugin: bool = True


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of a generation.

    Attributes:
        seed: seed of the noise; image i of a request depends on (seed, i) alone.
        cfg_scale: guidance scale; 1 turns guidance off and halves the rows of a batch.
        cfg_channels: number of leading channels that guidance acts on. None takes that of the
            reference implementation (3 for checkpoints of DiT, all for PixArt and folders of
            diffusers).
    """

    seed: int = 0
    cfg_scale: float = 4.0
    cfg_channels: int | None = None


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of a comparison of plans by speed.

    Attributes:
        plans: names or SPECs; the first is the baseline. Empty takes all plans.
        labels: one label per image; all images run as one batch.
        cfg_scale: guidance scale.
        repeats: number of measured rounds; every round runs every plan once.
        warmup: number of rounds before the measured ones. A GPU gets twice as many, because the
            second run of a plan records it.
        backend: as for `goc_deploy.load`.
        device: as for `goc_deploy.load`.
        threads: number of CPU threads; 0 is one per core.
    """

    plans: tuple[str, ...] = ()
    labels: tuple[int, ...] = (0,)
    cfg_scale: float = 4.0
    repeats: int = 5
    warmup: int = 1
    backend: str = "auto"
    device: str = "auto"
    threads: int = 0


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options of an evaluation of plans by quality.

    Attributes:
        plans: names or SPECs; empty takes all plans.
        preset: one of ``PRESETS``, which chooses the plans, or None.
        router: Learning-to-Cache router for the rows of the preset that need one, or None.
        num_images: number of images per plan.
        seed: seed of noise, labels and resampling; image i has the same noise as in goc-run.
        cfg_scale: guidance scale.
        cfg_channels: number of leading channels that guidance acts on; None takes that of the
            reference implementation.
        labels: ``balanced`` (every class equally often, in random order) or ``iid``.
        batch_size: number of images per run; 0 takes the largest of the engine directory.
        backend: as for `goc_deploy.load`.
        device: as for `goc_deploy.load`.
        threads: number of CPU threads; 0 is one per core.
        reference: ADM file to compare the distribution with, or None.
        features: ``inception``, the path of an ONNX model, or None for paired metrics only.
        inception_weights: torch-fidelity's weights, or None.
        samples: folder to read images from instead of generating them, or None.
        samples_output: folder to write images to, or None.
        converged: number of uncached steps of the converged solution to compare with; 0 skips
            the comparison.
        converged_images: number of images to compare with the converged solution.
        trajectory_images: number of images whose error is measured at every step.
        resamples: number of bootstrap resamples of FID and inception score.
        grid_images: number of pictures per plan in the report.
    """

    plans: tuple[str, ...] = ()
    preset: str | None = None
    router: Path | None = None
    num_images: int = 1000
    seed: int = 0
    cfg_scale: float = 4.0
    cfg_channels: int | None = None
    labels: str = "balanced"
    batch_size: int = 0
    backend: str = "auto"
    device: str = "auto"
    threads: int = 0
    reference: Path | None = None
    features: str | None = None
    inception_weights: Path | None = None
    samples: Path | None = None
    samples_output: Path | None = None
    converged: int = 0
    converged_images: int = 128
    trajectory_images: int = 64
    resamples: int = 50
    grid_images: int = 12
