"""Options of the main jobs with their defaults, so that command line and library cannot disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]  # (what, done, total)


CALIBRATION_SEED = (
    2**32
)  # far from the small seeds that people generate with: calibration images stay unseen
PRESETS = ("paper",)  # tables of the literature that goc-eval makes


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
        sampler: sampler SPEC; None takes ``diffusers``, the scheduler of the model's folder, or where there is none
            ``ddim``, or ``euler`` for a model that predicts a flow.
        prediction: what the model predicts, one of `goc_deploy.spec.PREDICTIONS`; None is what the scheduler of its folder
            says, or where there is none what its architecture does.
        plans: policy SPECs, in order of preference; empty takes `default_plans`.
        calibrate: images that calibrated policies learn from; None takes `goc_deploy.policies.calibration.default_images`.
        calibration_seed: of these images.
        cfg_scale: guidance scale of these images.
        weights: ``ema``, ``model``, or ``auto`` (ema where there is one).
        force: replace an existing engine directory.
        captions: what stands for labels of a model that draws captions: a file of embeddings, or of prompts (``.txt``, one
            per line, with a text encoder); None takes `goc_deploy.conditions.text.DEFAULT_PROMPTS` where there is a text encoder.
        text_encoder: folder of the T5 encoder that the model was trained with, or None.
        vae: folder of the AutoencoderKL whose decoder turns latents into images, or None.
        vae_tile: latents beyond so many pixels per side are decoded in tiles of that size.
        segments: of the plans, as `PlanOptions.segments`.
    """

    model: str = "auto"
    num_heads: int | None = None
    precision: str = "fp32"
    max_batch: int = 16
    steps: int = 20
    sampler: str | None = None
    prediction: str | None = None
    plans: tuple[str, ...] = ()
    calibrate: int | None = None
    calibration_seed: int = CALIBRATION_SEED
    cfg_scale: float = 4.0
    weights: str = "auto"
    force: bool = False
    captions: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    vae_tile: int = 64
    segments: str = "full"


def default_plans(*, calibrates: bool) -> tuple[str, ...]:
    """Policy SPECs where none are asked for. bf16 engines have no CPU kernels to calibrate with, and a model that draws
    captions needs some; then the gradient is one that no sampler was seen to amplify."""
    return ("none", "fora:2+goc" if calibrates else "fora:2+gc:0.5")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How to add a plan.

    Attributes:
        name: default: the SPEC made file-safe.
        steps: default: those of the engine's first plan.
        sampler: default: that of the engine's first plan.
        calibrate: images that a calibrated policy learns from; None takes `goc_deploy.policies.calibration.default_images`.
        seed: of these images.
        cfg_scale: guidance scale of these images.
        segments: what TensorRT runs as one engine: ``full``, a step that computes everything, or ``none``. ONNX Runtime
            always runs units.
    """

    name: str | None = None
    steps: int | None = None
    sampler: str | None = None
    calibrate: int | None = None
    seed: int = CALIBRATION_SEED
    cfg_scale: float = 4.0
    segments: str = "full"


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
        cfg_channels: guidance acts on the first channels only; None is what the model's reference does (3 for
            checkpoints of DiT, all for PixArt and folders of diffusers).
    """

    seed: int = 0
    cfg_scale: float = 4.0
    cfg_channels: int | None = None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What goc-run draws, on which backend, and the files that it writes.

    Attributes:
        plan: name or SPEC of the plan; None takes the first plan that caches.
        steps: number of sampling steps; None takes that of the plan.
        labels: class labels or class names, separated by commas; None takes 0, 1, 2, ... over the
            classes. If prompts or prompt embeddings are given, a label selects one of them.
        prompts: texts to draw; they need an engine directory with a text encoder.
        negative_prompts: texts to draw away from: none, one for all prompts, or one per prompt.
        prompt_embeds: file of prompt embeddings, ``.npz`` or ``.safetensors``, in place of prompts.
        num_images: number of images; labels are repeated in order. None takes one image per label
            or latent, or 8.
        seed: seed of the noise; image i depends on (seed, i) alone.
        cfg_scale: classifier-free guidance scale; 1 turns guidance off.
        cfg_channels: number of leading channels that guidance acts on; None takes the number of
            the model's reference implementation.
        latents: ``.npy`` file of x_T, (N, C, H, W), in place of seeded noise.
        output: file (``.png``, ``.npz``) or directory of the images.
        resume: keep the images that an interrupted run left in the ``output`` directory.
        latents_output: ``.npy`` file of the final latents, (N, C, H, W).
        trajectory_output: ``.npy`` file of the latents after every step, (T, N, C, H, W).
        report: JSON file of the time and kind of every step.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        cuda_graphs: as `goc_deploy.load` takes it.
        batch_size: images per batch; None takes the largest that the engine directory supports.
        threads: size of the thread pool; 0 is one thread per core.
    """

    plan: str | None = None
    steps: int | None = None
    labels: str | None = None
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    prompt_embeds: Path | None = None
    num_images: int | None = None
    seed: int = 0
    cfg_scale: float = 4.0
    cfg_channels: int | None = None
    latents: Path | None = None
    output: Path | None = None
    resume: bool = False
    latents_output: Path | None = None
    trajectory_output: Path | None = None
    report: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    cuda_graphs: bool = True
    batch_size: int | None = None
    threads: int = 0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to compare plans.

    Attributes:
        plans: names or SPECs; the first is the baseline; empty takes all plans of the engine.
        labels: one per image; all images run as one batch.
        cfg_scale: classifier-free guidance scale.
        repeats: measured rounds; every round runs every plan once.
        warmup: rounds that are not measured; on a GPU twice as many, because the second run of a plan records it.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        threads: 0 is one per core.
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
    """How to evaluate plans.

    Attributes:
        plans: names or SPECs; empty takes all plans of the engine.
        preset: one of ``PRESETS``, which chooses the plans, or None.
        router: Learning-to-Cache router for the preset's rows of it, or None.
        num_images: images per plan.
        seed: of noise, labels and resampling; image i has the noise that goc-run gives it.
        cfg_scale: classifier-free guidance scale.
        cfg_channels: guidance acts on the first channels only; None is what the model's reference does.
        labels: ``balanced`` (every class equally often, in random order) or ``iid``.
        batch_size: images per run; 0 is what the engine was exported for.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        threads: 0 is one per core.
        reference: ADM file to compare the distribution with, or None.
        features: ``inception``, the path of an ONNX model, or None for paired metrics only.
        inception_weights: torch-fidelity's weights, or None.
        samples: folder to read images from instead of generating them, or None.
        samples_output: folder to write images to, or None.
        converged: uncached steps of a converged solution to measure the distance to; 0 is none.
        converged_images: images that the converged solution is made of.
        trajectory_images: images whose error is followed over the steps.
        resamples: bootstrap resamples of FID and inception score.
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
