"""The public functions. What each of them needs is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from goc_deploy.options import (
    CheckpointWeights,
    ExportOptions,
    History,
    Offload,
    PlanOptions,
    Progress,
    Segments,
    no_progress,
)
from goc_deploy.precision import Precision, WeightFormat

if TYPE_CHECKING:
    from goc_deploy.engine_dir.manifest import Manifest, PlanEntry
    from goc_deploy.protocols import Backend
    from goc_deploy.runtime.pipeline import Pipeline

EXPORT, PLAN = ExportOptions(), PlanOptions()  # the defaults of the signatures below


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    model: str = EXPORT.model,
    num_heads: int | None = EXPORT.num_heads,
    precision: Precision = EXPORT.precision,
    max_batch: int = EXPORT.max_batch,
    steps: int = EXPORT.steps,
    sampler: str | None = EXPORT.sampler,
    prediction: str | None = EXPORT.prediction,
    plans: Sequence[str] = EXPORT.plans,
    calibrate: int | None = EXPORT.calibrate,
    calibration_seed: int = EXPORT.calibration_seed,
    cfg_scale: float | None = EXPORT.cfg_scale,
    weights: CheckpointWeights = EXPORT.weights,
    force: bool = EXPORT.force,
    captions: str | Path | None = EXPORT.captions,
    text_encoder: str | Path | None = EXPORT.text_encoder,
    vae: str | Path | None = EXPORT.vae,
    vae_tile: int = EXPORT.vae_tile,
    segments: Segments = EXPORT.segments,
    size: tuple[int, int] | None = EXPORT.size,
    max_size: tuple[int, int] | None = EXPORT.max_size,
    frames: int | None = EXPORT.frames,
    max_frames: int | None = EXPORT.max_frames,
    caption_tokens: int | None = EXPORT.caption_tokens,
    max_references: int | None = EXPORT.max_references,
    skip_guidance_layers: Sequence[int] = EXPORT.skip_guidance_layers,
    quantize: WeightFormat | Sequence[WeightFormat] = EXPORT.quantize,
    quantize_exclude: Sequence[str] = EXPORT.quantize_exclude,
    max_error: float | None = EXPORT.max_error,
    loras: Sequence[str | Path] = EXPORT.loras,
    reuse_engines: str | Path | None = EXPORT.reuse_engines,
    progress: Progress = no_progress,
) -> Manifest:
    """Export a checkpoint to an engine directory.

    Args:
        checkpoint: ``.pt``, ``.pth`` or ``.safetensors`` file, a folder that diffusers saved, or
            the id of such a folder on the Hugging Face Hub.
        output: directory to make; it appears whole or not at all.
        model: architecture, or ``auto`` to recognise it.
        num_heads: number of attention heads. Inferred for widths 384, 768, 1024 and 1152;
            required otherwise.
        precision: dtype of weights, tokens and history: ``fp32``, ``fp16`` or ``bf16``.
        max_batch: largest number of images per batch.
        steps: number of sampling steps of the plans.
        sampler: sampler SPEC; None takes ``diffusers``, the scheduler of the model's folder.
            Without such a scheduler it is ``ddim``, or ``euler`` for a model that predicts a flow.
        prediction: what the model predicts, one of `goc_deploy.spec.PREDICTION_TYPES`; None takes
            it from the scheduler of the model's folder, or without one from the architecture.
        plans: policy SPECs, in order of preference; empty takes `goc_deploy.options.default_plans`.
        calibrate: number of images that calibrated policies learn from; None takes
            `goc_deploy.policies.calibration.default_images`.
        calibration_seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images; None takes 4, or 1 for a model with
            embedded guidance.
        weights: weights of a training checkpoint: ``ema``, ``model``, or ``auto`` (``ema`` if there
            are such weights).
        force: replace an existing engine directory.
        captions: captions of a text-conditional model in place of class labels: a file of
            embeddings, or of prompts (``.txt``, one per line, with a text encoder). None takes
            `goc_deploy.conditions.text.DEFAULT_PROMPTS` if there is a text encoder.
        text_encoder: folder of the T5 encoder that the model was trained with, or of its pipeline
            if it reads several encoders.
        vae: folder of the AutoencoderKL whose decoder turns latents into images.
        vae_tile: latents with more pixels per side than this are decoded in tiles of this size.
        segments: what TensorRT runs as one engine: ``full``, a full step, or ``none``.
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
        quantize: format of the blocks, or several between which ``max_error`` decides: ``w8`` or
            ``w4`` (weights of 8 or 4 bits, computed with in the precision), ``w8+dynamic`` (ONNX
            Runtime rounds activations too), ``int8`` (products of int8, with ranges that are seen
            as the plans run), ``int8+smooth`` (range is moved from activations to weights first),
            ``fp8`` (as ``int8`` with float8e4m3fn). Empty is the precision.
        quantize_exclude: patterns of units whose weights keep the precision, such as ``first``,
            ``last:2`` or ``*_attn``. Empty takes the defaults of the family for ``int8``,
            ``int8+smooth`` and ``fp8``; ``none`` excludes nothing.
        max_error: largest relative L2 of the final latents of every plan to no cache in the
            precision, on the calibration images: units get formats that fit. None quantises all.
        loras: LoRAs to merge into the weights, ``FILE`` or ``FILE:SCALE`` each. FILE is a LoRA of
            diffusers, PEFT or kohya's sd-scripts, or the folder of one; SCALE is 1 without one.
        reuse_engines: engine directory with the same graphs and other weights, whose TensorRT
            engines with shared weights are copied, so that none has to be built.
        progress: called with (what, done, total).

    Returns:
        The manifest of the directory.

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    from goc_deploy.api.exporting import export_with

    options = ExportOptions(
        model=model,
        num_heads=num_heads,
        precision=precision,
        max_batch=max_batch,
        steps=steps,
        sampler=sampler,
        prediction=prediction,
        plans=tuple(plans),
        calibrate=calibrate,
        calibration_seed=calibration_seed,
        cfg_scale=cfg_scale,
        weights=weights,
        force=force,
        captions=_path(captions),
        text_encoder=_path(text_encoder),
        vae=_path(vae),
        vae_tile=vae_tile,
        segments=segments,
        size=size,
        max_size=max_size,
        frames=frames,
        max_frames=max_frames,
        caption_tokens=caption_tokens,
        max_references=max_references,
        skip_guidance_layers=tuple(skip_guidance_layers),
        quantize=(quantize,) if isinstance(quantize, str) else tuple(quantize),
        quantize_exclude=tuple(quantize_exclude),
        max_error=max_error,
        loras=tuple(map(str, loras)),
        reuse_engines=_path(reuse_engines),
    )
    return export_with(Path(checkpoint), Path(output), options, progress)[0]


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def add_plan(
    engine_dir: str | Path,
    spec: str,
    *,
    name: str | None = PLAN.name,
    steps: int | None = PLAN.steps,
    sampler: str | None = PLAN.sampler,
    calibrate: int | None = PLAN.calibrate,
    seed: int = PLAN.seed,
    cfg_scale: float | None = PLAN.cfg_scale,
    segments: Segments = PLAN.segments,
    full_precision: str | Path | None = PLAN.full_precision,
    progress: Progress = no_progress,
) -> PlanEntry:
    """Add a plan to an engine directory that other processes may be reading.

    Args:
        engine_dir: the directory that `export` wrote.
        spec: policy SPEC.
        name: name of the plan; None makes the SPEC file-safe.
        steps: number of sampling steps; None takes that of the directory's first plan.
        sampler: sampler SPEC; None takes that of the directory's first plan.
        calibrate: number of images that a calibrated policy learns from; None takes
            `goc_deploy.policies.calibration.default_images`.
        seed: seed of the calibration images.
        cfg_scale: guidance scale of the calibration images; None takes 4, or 1 for a model with
            embedded guidance.
        segments: what TensorRT runs as one engine: ``full``, a full step, or ``none``. ONNX
            Runtime always runs units.
        full_precision: engine directory of the same model without quantised weights, with whose
            images without cache a calibrated policy is compared; None compares with those of
            ``engine_dir``.
        progress: called with (what, done, total) by policies that calibrate.

    Returns:
        The entry of the plan in the manifest; that of an equal plan if there is one already.

    Raises:
        UsageError, ScheduleError: a wrong SPEC, name, step count or sampler.
        ConflictError: another plan has that name, the directory cannot be written, or it was
            replaced meanwhile.
        EngineDirError: the directory is corrupt.
    """
    from goc_deploy.api.engines import cpu_backend
    from goc_deploy.api.requirements import require

    require("export", "onnx", *(("torch", "safetensors") if spec.startswith("l2c:") else ()))
    from goc_deploy.api.plans import compiled_plan, publish_plan
    from goc_deploy.engine_dir.directory import EngineDir

    directory = EngineDir.open(Path(engine_dir))
    options = PlanOptions(
        name, steps, sampler, calibrate, seed, cfg_scale, segments, _path(full_precision)
    )
    plan = compiled_plan(directory, spec, options, cpu_backend, progress)
    return publish_plan(directory, plan)


def load(
    engine_dir: str | Path,
    *,
    backend: str = "auto",
    plan: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_sessions: int = 1,
    threads: int = 0,
    shared_pool: bool = True,
    cuda_graphs: bool = True,
    device: str = "auto",
    history: History = "auto",
    offload: Offload = "none",
) -> Pipeline:
    """Load an engine directory.

    Args:
        engine_dir: the directory that `export` wrote.
        backend: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime-cuda``, ``onnxruntime``, or ``auto``,
            the first of these that works; the log and the report name the reason why others do
            not. TensorRT engines that are missing are built first.
        plan: name or SPEC; None takes the first plan that caches. A SPEC that learns nothing from
            images need not be in the directory: it is compiled here, for TensorRT only if the
            directory has engines of its predictions.
        steps: number of sampling steps, if it is not that of the plan; such a plan is compiled here
            too.
        batch_size: images per batch, at most the directory's ``max_batch`` (the default).
        max_sessions: callers that run at the same time; each session has its own buffers.
        threads: size of the thread pool; 0 is one thread per core.
        shared_pool: one ONNX Runtime thread pool for the process, which is faster. Other sessions
            that your program makes then need ``SessionOptions.use_per_session_threads = False``;
            turn this off if that is not possible.
        cuda_graphs: record CUDA graphs, on TensorRT of whole steps the second time they run for a
            batch shape, on ONNX Runtime of each session. Turn it off for debugging.
        device: ``cpu``, ``cuda``, or ``cuda:1`` for another GPU than the first; ``auto`` leaves it
            to the backend.
        history: what is kept for later steps: ``features`` of every unit, ``sums`` of what later
            steps add, whose number does not grow with the depth, or ``auto``, which takes sums
            where they save much memory (`goc_deploy.runtime.history.plan_to_run`). The report of a
            result has the choice and its reason.
        offload: ``text`` frees the text encoders when prompts are encoded, and loads them again for
            prompts that were not encoded recently; ``none`` keeps them.

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    from goc_deploy.api.engines import loaded_on
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.choice import BackendOptions

    directory, unlisted = EngineDir.open(Path(engine_dir)), None
    if plan is not None or steps is not None:
        from goc_deploy.api.plans import plan_on_the_fly

        plan, unlisted = plan_on_the_fly(directory, plan, steps)

    def load_one(on: Backend) -> list[Pipeline]:
        from goc_deploy.runtime.loading import load_pipelines

        return load_pipelines(
            directory,
            on,
            [plan],
            batch_size,
            max_sessions,
            unlisted=unlisted,
            history=history,
            offload=offload,
        )

    options = BackendOptions(threads, shared_pool, cuda_graphs, device)
    return loaded_on(backend, directory, options, load_one)[0]


def load_plans(
    engine_dir: str | Path,
    plans: Sequence[str],
    *,
    backend: str = "auto",
    batch_size: int | None = None,
    max_sessions: int = 1,
    threads: int = 0,
    shared_pool: bool = True,
    cuda_graphs: bool = True,
    device: str = "auto",
    history: History = "auto",
    all_units: bool = False,
) -> list[Pipeline]:
    """Load several plans of one engine directory, such as tiers of quality, on one set of weights.

    Args:
        engine_dir: the directory that `export` wrote.
        plans: names or SPECs.
        backend: as in `load`.
        batch_size: as in `load`.
        max_sessions: callers of each pipeline that run at the same time.
        threads: as in `load`.
        shared_pool: as in `load`.
        cuda_graphs: as in `load`.
        device: as in `load`.
        history: as in `load`.
        all_units: also load units that none of these plans launches, for
            `goc_deploy.runtime.pipeline.Pipeline.with_plan`.

    Returns:
        A pipeline for each plan, in their order. Each is closed by itself.

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    from goc_deploy.api.engines import loaded_plans
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.choice import BackendOptions

    return loaded_plans(
        EngineDir.open(Path(engine_dir)),
        plans,
        backend,
        BackendOptions(threads, shared_pool, cuda_graphs, device),
        batch_size=batch_size,
        max_sessions=max_sessions,
        all_units=all_units,
        history=history,
    )
