"""Options of the main jobs and their defaults, shared by the commands and the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from goc_deploy.precision import Precision, WeightFormat

Progress = Callable[[str, int, int], None]  # (name of the job, done, total)

# Far from the small seeds that people generate with, so that calibration images stay unseen.
CALIBRATION_SEED = 2**32
Segments = Literal["full", "none"]
SEGMENTS: tuple[Segments, ...] = get_args(Segments)
Offload = Literal["none", "text"]  # what leaves the memory when it has no work
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
History = Literal["auto", "features", "sums"]  # what a loaded plan keeps for later steps
HISTORIES: tuple[History, ...] = get_args(History)
SkipGuidance = float | tuple[float, float, float]  # scale, or scale, start and stop
VIDEO_SUFFIXES = (".mp4", ".webp")
FRAMES_PER_SECOND, MAX_FRAMES_PER_SECOND = 16.0, 1000.0
WeightMode = Literal["embedded", "shared"]  # how a TensorRT engine holds its weights
CheckpointWeights = Literal["auto", "ema", "model"]
PRESETS = ("paper",)  # tables of the literature that goc-eval reproduces


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        model: architecture, or ``auto`` to recognise it.
        num_heads: number of attention heads. Inferred for widths 384, 768, 1024 and 1152; required
            otherwise.
        precision: dtype of weights, tokens and history: ``fp32``, ``fp16`` or ``bf16``.
        quantize: formats of the blocks, one, or several between which ``max_error`` decides:
            ``w8`` or ``w4`` (weights of 8 or 4 bits, computed with in the precision),
            ``w8+dynamic`` (ONNX Runtime rounds activations too), ``int8`` (products of int8, with
            ranges that are seen as the plans run), ``int8+smooth`` (range is moved from activations
            to weights first), ``fp8`` (as ``int8`` with float8e4m3fn). Empty is the precision.
        quantize_exclude: patterns of units whose weights keep the precision, such as ``first``,
            ``last:2``, ``block_03`` or ``*_attn``. Empty takes the defaults of the family for
            ``int8``, ``int8+smooth`` and ``fp8``; ``none`` excludes nothing.
        max_error: largest relative L2 of the final latents of every plan to no cache in the
            precision, on the calibration images: units get formats that fit. None quantises all.
        max_batch: largest number of images per batch.
        steps: number of sampling steps of the plans.
        sampler: sampler SPEC; None takes ``diffusers``, the scheduler of the model's folder.
            Without such a scheduler it is ``ddim``, or ``euler`` for a model that predicts a flow.
        prediction: what the model predicts, one of `goc_deploy.spec.PREDICTION_TYPES`; None takes
            it from the scheduler of the model's folder, or without one from the architecture.
        plans: policy SPECs, in order of preference; empty takes `default_plans`.
        calibrate: number of images that calibrated policies learn from; None takes
            `goc_deploy.policies.calibration.default_images`.
        calibration_seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images; None as in `GenerateOptions`.
        weights: weights of a training checkpoint: ``ema``, ``model``, or ``auto`` (``ema`` if there
            are such weights).
        force: replace an existing engine directory.
        captions: captions of a text-conditional model in place of class labels: a file of
            embeddings, or of prompts (``.txt``, one per line, with a text encoder). None takes
            `goc_deploy.conditions.text.DEFAULT_PROMPTS` if there is a text encoder.
        text_encoder: folder of the T5 encoder that the model was trained with, or of its pipeline
            if it reads several encoders; or None.
        vae: folder of the AutoencoderKL whose decoder turns latents into images, or None.
        vae_tile: latents with more pixels per side than this, also those of videos, are decoded in
            tiles of this size.
        segments: what TensorRT runs as one engine, as in `PlanOptions`.
        size: usual width and height of a sample in pixels (of the latents, if there is no VAE);
            None is the size that the model was trained for. With any of the four sizes, the engines
            accept all sizes up to the largest.
        max_size: largest width and height; a sample may be wider or higher if it has no more
            pixels. None is ``size``.
        frames: usual number of frames of a video; None is that of the model.
        max_frames: largest number of frames; None is ``frames``.
        caption_tokens: tokens that every caption has, which longer prompts are cut to and shorter
            ones padded to; None is what the model was trained for.
        max_references: largest number of reference images of a request to a model that edits
            images, each of at most as many pixels as ``max_size``; None is 1.
        skip_guidance_layers: the blocks that skip-layer guidance can leave out, for which engines
            then have a third row of each image; empty for engines without it.
        loras: LoRAs to merge into the weights, ``FILE`` or ``FILE:SCALE`` each. FILE is a LoRA of
            diffusers, PEFT or kohya's sd-scripts, or the folder of one; SCALE is 1 without one.
        reuse_engines: engine directory with the same graphs and other weights, whose TensorRT
            engines with shared weights are copied, so that none has to be built; or None.
    """

    model: str = "auto"
    num_heads: int | None = None
    precision: Precision = "fp32"
    quantize: tuple[WeightFormat, ...] = ()
    quantize_exclude: tuple[str, ...] = ()
    max_error: float | None = None
    max_batch: int = 16
    steps: int = 20
    sampler: str | None = None
    prediction: str | None = None
    plans: tuple[str, ...] = ()
    calibrate: int | None = None
    calibration_seed: int = CALIBRATION_SEED
    cfg_scale: float | None = None
    weights: CheckpointWeights = "auto"
    force: bool = False
    captions: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    vae_tile: int = 64
    segments: Segments = "full"
    size: tuple[int, int] | None = None
    max_size: tuple[int, int] | None = None
    frames: int | None = None
    max_frames: int | None = None
    caption_tokens: int | None = None
    max_references: int | None = None
    skip_guidance_layers: tuple[int, ...] = ()
    loras: tuple[str, ...] = ()
    reuse_engines: Path | None = None


def default_plans(*, calibrates: bool) -> tuple[str, ...]:
    """Default SPECs of an export.

    Calibration is impossible for bf16 engines, which have no CPU kernels, and for text-conditional
    models without captions. These get a gradient of 0.5, which no tested sampler amplifies.
    """
    return ("none", "fora:2+goc" if calibrates else "fora:2+gc:0.5")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of a plan that is added to an engine directory.

    Attributes:
        name: name of the plan; None makes the SPEC file-safe.
        steps: number of sampling steps; None takes that of the directory's first plan.
        sampler: sampler SPEC; None takes that of the directory's first plan.
        calibrate: number of images that a calibrated policy learns from; None takes
            `goc_deploy.policies.calibration.default_images`.
        seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images; None as in `GenerateOptions`.
        segments: what TensorRT runs as one engine: ``full``, a step that computes everything, or
            ``none``. ONNX Runtime always runs units, and so does a model with two sets of weights.
        full_precision: engine directory of the same model without quantised weights. A calibrated
            policy runs on the engine directory that gets the plan, and is compared with the images
            of this one without cache; None compares with those of the former.
    """

    name: str | None = None
    steps: int | None = None
    sampler: str | None = None
    calibrate: int | None = None
    seed: int = CALIBRATION_SEED
    cfg_scale: float | None = None
    segments: Segments = "full"
    full_precision: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of the TensorRT engines of an engine directory.

    Attributes:
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        capabilities: compute capabilities of the GPUs to build for, such as ``8.6``; empty takes
            all that TensorRT-RTX supports from Ampere on, and for ``tensorrt`` that of this
            machine.
        weight_mode: ``embedded``, an engine per unit that holds its weights, or ``shared``, an
            engine per kind of unit that reads them at an address.
        scratch_limit_bytes: limit of the scratch memory of one engine; 0 is no limit.
        plugin: use the plugin if it needs fewer launches.
    """

    backend: str = "tensorrt-rtx"
    capabilities: tuple[str, ...] = ()
    weight_mode: WeightMode = "embedded"
    scratch_limit_bytes: int = 0
    plugin: bool = True


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of a generation.

    Attributes:
        seed: seed of the noise; image i of a request depends on (seed, i) alone.
        cfg_scale: classifier-free guidance scale; 1 turns guidance off and runs half the rows. None
            takes 4, or 1 for a model with embedded guidance.
        cfg_channels: number of leading channels that guidance acts on; None takes that of the
            model's reference implementation (3 for checkpoints of DiT, all for PixArt and folders
            of diffusers).
        guidance: guidance scale that a distilled model embeds, such as FLUX.1-dev; None takes 3.5.
            Other models refuse it.
        cfg_scale_2: guidance scale of the second set of weights of a model that has two, such as
            Wan 2.2 A14B; None takes ``cfg_scale``. Other models refuse it.
        skip_layer_guidance: scale of skip-layer guidance, or its scale and the shares of the steps
            after which it starts and before which it stops; None draws without it.
    """

    seed: int = 0
    cfg_scale: float | None = None
    cfg_channels: int | None = None
    guidance: float | None = None
    cfg_scale_2: float | None = None
    skip_layer_guidance: SkipGuidance | None = None


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
        cfg_scale: classifier-free guidance scale; 1 turns guidance off. None as in
            `GenerateOptions`.
        cfg_channels: number of leading channels that guidance acts on; None takes the number of
            the model's reference implementation.
        guidance: as in `GenerateOptions`.
        cfg_scale_2: as in `GenerateOptions`.
        skip_layer_guidance: as in `GenerateOptions`.
        latents: ``.npy`` file of x_T, (N, C, H, W), in place of seeded noise.
        reference_latents: file of the latents of the images to edit, ``.npz`` or ``.safetensors``,
            if the model edits images.
        output: file (``.png``, ``.npz``) or directory of the images, or of the videos (``.mp4``,
            ``.webp``, or a directory of the frames).
        resume: keep the images that an interrupted run left in the ``output`` directory.
        latents_output: ``.npy`` file of the final latents, (N, C, H, W).
        trajectory_output: ``.npy`` file of the latents after every step, (T, N, C, H, W).
        report: JSON file of the time and kind of every step.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        cuda_graphs: as `goc_deploy.load` takes it.
        history: as `goc_deploy.load` takes it.
        offload: as `goc_deploy.load` takes it.
        batch_size: images per batch; None takes the largest that the engine directory supports.
        threads: size of the thread pool; 0 is one thread per core.
        size: width and height of the images in pixels, if the engine directory accepts any size;
            None takes its usual size.
        frames: number of frames of a video; None takes the usual number.
        fps: frames per second of the videos that are written.
    """

    plan: str | None = None
    steps: int | None = None
    labels: str | None = None
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    prompt_embeds: Path | None = None
    num_images: int | None = None
    seed: int = 0
    cfg_scale: float | None = None
    cfg_channels: int | None = None
    guidance: float | None = None
    cfg_scale_2: float | None = None
    skip_layer_guidance: SkipGuidance | None = None
    latents: Path | None = None
    reference_latents: Path | None = None
    output: Path | None = None
    resume: bool = False
    latents_output: Path | None = None
    trajectory_output: Path | None = None
    report: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    cuda_graphs: bool = True
    history: History = "auto"
    offload: Offload = "none"
    batch_size: int | None = None
    threads: int = 0
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float = FRAMES_PER_SECOND


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """How a large series of images is split into shards, and who draws them.

    Attributes:
        folder: folder of the shards; with Ray on a file system that all nodes share.
        shard_images: images of a shard, a multiple of the batch size; None takes the smallest
            multiple that is at least 64.
        ray: address of a Ray cluster whose workers draw the shards, ``auto``, or ``local`` for one
            that is started on this machine; None draws them in this process.
        workers: number of workers with Ray; None takes as many as there is room for.
    """

    folder: Path
    shard_images: int | None = None
    ray: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of an HTTP server.

    Attributes:
        engine_dirs: the engine directories.
        plans: names or SPECs of the plans to load from each; empty takes all.
        host: address to listen on.
        port: port to listen on.
        batch_images: largest number of images that run together; None takes that of the engines.
        max_delay_ms: how long a request waits for others to run with.
        queued_images: images that may wait.
        images_per_request: largest number of images of a request.
        workers: batches that run at the same time.
        drain_seconds: how long accepted requests may take after the signal to stop.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        threads: size of the thread pool; 0 is one thread per core.
    """

    engine_dirs: tuple[Path, ...] = ()
    plans: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    batch_images: int | None = None
    max_delay_ms: float = 10.0
    queued_images: int = 256
    images_per_request: int = 16
    workers: int = 1
    drain_seconds: float = 30.0
    backend: str = "auto"
    device: str = "auto"
    threads: int = 0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of a comparison of plans by speed.

    Attributes:
        plans: names or SPECs; the first is the baseline; empty takes all plans.
        labels: one per image; all images run as one batch.
        cfg_scale: classifier-free guidance scale; None as in `GenerateOptions`.
        repeats: number of measured rounds; every round runs every plan once.
        warmup: number of rounds that are not measured; a GPU runs twice as many, because the
            second run of a plan records it.
        history: as `goc_deploy.load` takes it.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        threads: size of the thread pool; 0 is one thread per core.
    """

    plans: tuple[str, ...] = ()
    labels: tuple[int, ...] = (0,)
    cfg_scale: float | None = None
    repeats: int = 5
    warmup: int = 1
    history: History = "auto"
    backend: str = "auto"
    device: str = "auto"
    threads: int = 0


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options of an evaluation of plans by quality.

    Attributes:
        plans: names or SPECs; empty takes all plans.
        preset: one of ``PRESETS``, which chooses the plans, or None.
        router: Learning-to-Cache router that adds rows to the preset, or None.
        num_images: number of images per plan.
        seed: seed of noise, labels and resampling; image i has the noise that it has in goc-run.
        cfg_scale: classifier-free guidance scale; None as in `GenerateOptions`.
        cfg_channels: number of leading channels that guidance acts on; None takes that of the
            model's reference implementation.
        labels: ``balanced`` (every class equally often, in random order) or ``iid``.
        batch_size: number of images per batch; 0 takes the largest of the engine directory.
        backend: as `goc_deploy.load` takes it.
        device: as `goc_deploy.load` takes it.
        threads: size of the thread pool; 0 is one thread per core.
        reference: ADM file to compare the distribution with, or None.
        features: ``inception``, the path of an ONNX model, or None for paired metrics only.
        inception_weights: torch-fidelity's weights, or None.
        samples: folder to read images from instead of generating them, or None.
        samples_output: folder to write images to, or None.
        converged: number of uncached steps of a converged solution to compare with; 0 is none.
        converged_images: number of images of the converged solution.
        full_precision: engine directory of the same model and plans without quantised weights. Its
            uncached plan is what all plans are compared with, and its plans are rows too; or None.
        trajectory_images: number of images whose error is measured after every step.
        resamples: number of bootstrap resamples of FID and inception score.
    """

    plans: tuple[str, ...] = ()
    preset: str | None = None
    router: Path | None = None
    num_images: int = 1000
    seed: int = 0
    cfg_scale: float | None = None
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
    full_precision: Path | None = None
    trajectory_images: int = 64
    resamples: int = 50
