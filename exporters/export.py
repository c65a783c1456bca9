"""Checkpoint to engine directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.disk import check_free_space, directory_lock, staged
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, GraphEntry, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import check_target, files_below
from goc_deploy.errors import CalibrationNeededError, GocError, ModelError, UsageError
from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.architectures.flux import FLUX
from goc_deploy.exporters.architectures.flux2 import FLUX2
from goc_deploy.exporters.architectures.pixart import PIXART
from goc_deploy.exporters.architectures.pixart_sigma import PIXART_SIGMA
from goc_deploy.exporters.architectures.qwen import QWEN_IMAGE
from goc_deploy.exporters.architectures.qwen_edit import QWEN_IMAGE_EDIT
from goc_deploy.exporters.architectures.sd3 import SD3
from goc_deploy.exporters.architectures.sit import SIT
from goc_deploy.exporters.architectures.wan import WAN
from goc_deploy.exporters.architectures.z_image import Z_IMAGE
from goc_deploy.exporters.checkpoint import (
    Checkpoint,
    check_values,
    load_checkpoint,
    of_diffusion_model,
    of_float8,
)
from goc_deploy.exporters.companions.attach import Companions, read_companions, write_companions
from goc_deploy.exporters.graphs.plan_files import write_plan
from goc_deploy.exporters.graphs.step import (
    collect_graph,
    modulation_graph,
    residual_graph,
    sampler_graphs,
)
from goc_deploy.exporters.hub import folder_from_hub, hub_id
from goc_deploy.exporters.lora.merging import MergedTensors
from goc_deploy.exporters.lora.reading import Lora, digest_of_merge, read_loras
from goc_deploy.exporters.model_folder import FolderModel, read_model_folder
from goc_deploy.exporters.quantize.job import QUANTIZATION, Runs, quantization_of
from goc_deploy.exporters.quantized_files import ScaledTensors
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.exporters.sample_sizes import spec_for_sizes
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.exporters.skip_guidance import with_skip_guidance
from goc_deploy.exporters.unit_files import UnitWriter, mapped
from goc_deploy.exporters.weight_sets import split_sets, with_second_set
from goc_deploy.guidance import cfg_scale_of
from goc_deploy.options import ExportOptions, Progress, default_plans
from goc_deploy.policies.calibration import (
    CalibrationOptions,
    Laboratory,
    ObservingLaboratory,
    check_options,
    default_images,
)
from goc_deploy.policies.grammar import Policy, check_plan_name, parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.protocols import Backend
from goc_deploy.samplers import default_sampler
from goc_deploy.samplers.process import Process
from goc_deploy.spec import ModelSpec
from goc_deploy.version import __version__

ARCHITECTURES = {
    family.name: family
    for family in (
        DIT,
        PIXART,
        PIXART_SIGMA,
        SD3,
        SIT,
        WAN,
        FLUX,
        FLUX2,
        QWEN_IMAGE,
        QWEN_IMAGE_EDIT,
        Z_IMAGE,
    )
}
# Makes the laboratory of an engine directory for a sampler.
LaboratoryMaker = Callable[[EngineDir, str, CalibrationOptions], ObservingLaboratory]

RECORDED_PACKAGES = ("torch", "onnx", "onnxscript", "numpy")


def export_checkpoint(
    checkpoint_path: Path,
    output: Path,
    options: ExportOptions,
    backend: Backend,
    make_laboratory: LaboratoryMaker,
    progress: Progress,
) -> tuple[Manifest, bool]:
    """Export a checkpoint; the engine directory is published complete or not at all.

    Args:
        checkpoint_path: a ``.pt``, ``.pth`` or ``.safetensors`` file, a folder that diffusers
            saved, or the id of a model on the Hugging Face Hub, ``org/name``.
        output: engine directory to create.
        options: export options.
        backend: runs the exported graphs for the comparison with PyTorch.
        make_laboratory: makes the laboratory in which policies are calibrated, on the engine
            directory before it is published.
        progress: called with (what, done, total).

    Returns:
        The manifest, and whether anything was written (False: the same export exists already).

    Raises:
        ModelError, SafetyError: the checkpoint is not usable.
        UsageError, ScheduleError: a SPEC is wrong.
        ConflictError, ResourceError: the output cannot be written.
        VerificationError: an exported graph differs from PyTorch.
    """
    name = hub_id(checkpoint_path)
    model = _read(folder_from_hub(name) if name else checkpoint_path, options)
    checkpoint, spec = model.checkpoint, with_caption_tokens(model.spec, options.caption_tokens)
    architecture = ARCHITECTURES[spec.architecture]
    if spec.boundary and options.loras:
        raise UsageError(
            "`loras` are not supported for a model with two sets of weights; merge each into its "
            "transformer before the export"
        )
    for of_set in split_sets(checkpoint.tensors) if spec.boundary else [checkpoint.tensors]:
        architecture.check_tensors(of_set, spec)
    loras = read_loras(options.loras, checkpoint.tensors, spec, architecture)
    scaled = ScaledTensors(checkpoint.tensors, checkpoint.scales)
    tensors = MergedTensors(scaled, [a for lora in loras for a in lora.additions])
    companions = read_companions(options, spec)
    spec, pixels = companions.scaled(spec)
    spec = spec_for_sizes(spec, tensors, architecture, options, pixels)
    if spec.text_conditional:
        spec = replace(spec, choices=companions.labels)
    if spec.max_references and spec.choices:
        raise UsageError(
            "`captions` are not stored for a model that edits images, because each goes with its "
            "reference images; leave them out, and give prompt embeddings with each run"
        )
    calibrates = options.precision != "bf16" and spec.choices > 0 and not spec.boundary
    spec = with_skip_guidance(spec, options.skip_guidance_layers)
    options = replace(
        options,
        plans=options.plans or default_plans(calibrates=calibrates),
        cfg_scale=cfg_scale_of(options.cfg_scale, spec),
    )
    process = Process(spec.prediction_type, model.scheduler, spec.tokens)
    quantization = quantization_of(options, spec, architecture.sensitive)
    plans = _compile_plans(spec, process, options)
    check_options(_calibration(spec, options))
    provenance = _provenance(model, name, loras, companions, options)
    with directory_lock(output):
        present = _same_engine(output, provenance)
        if present:
            return present, False
        check_target(output, force=options.force)
        _check_checkpoints(output, (checkpoint, *companions.checkpoints), options.precision)
        with staged(output) as stage:
            variants = quantization.variants(stage)
            writer = UnitWriter(stage, backend, progress, quantization.while_writing, variants)
            kinds = architecture.graph_kinds(spec, options.precision)
            kinds = with_second_set(kinds) if spec.boundary else kinds
            units = writer.write(kinds, tensors, options.precision)
            units += _write_step_graphs(stage, spec, options.precision)
            bare = _bare_manifest(model, spec, units, provenance, options)
            bare = write_companions(companions, bare, options, writer)
            entries = tuple(lora.entry for lora in loras)
            bare = replace(bare, files=files_below(stage), loras=entries)
            sampler, images = _sampler(process, options), _calibration(spec, options)
            runs = Runs(
                stage,
                sampler,
                images,
                lambda directory: make_laboratory(directory, sampler, images),
                backend,
                progress,
            )
            compiled = _calibrated(bare, plans, options, runs)
            bare = quantization.applied(bare, variants, compiled, runs)
            manifest = _write_plans(stage, bare, compiled, backend)
    return manifest, True


def _read(path: Path, options: ExportOptions) -> FolderModel:
    """Read a checkpoint file, or a folder that diffusers saved."""
    if options.model not in ("auto", *ARCHITECTURES):
        raise ModelError(
            f"`model={options.model}` is unknown; this version has {', '.join(ARCHITECTURES)}"
        )
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        whole = load_checkpoint(path, options.weights)
        checkpoint, spec = _recognise(of_float8(of_diffusion_model(whole)), options)
        return FolderModel(
            checkpoint,
            replace(spec, prediction_type=options.prediction or spec.prediction_type),
            (),
            None,
        )
    wanted = (
        ARCHITECTURES if options.model == "auto" else {options.model: ARCHITECTURES[options.model]}
    )
    model = read_model_folder(path, wanted, options.prediction)
    if options.num_heads not in (None, model.spec.heads):
        raise UsageError(
            f"`num_heads={options.num_heads}`: the configuration in {path} says {model.spec.heads}"
        )
    if options.weights != "auto":
        raise UsageError(
            f"`weights={options.weights}` is for training checkpoints; {path} holds one "
            "set of weights"
        )
    return model


def with_caption_tokens(spec: ModelSpec, tokens: int | None) -> ModelSpec:
    """The model with this number of tokens for each caption; None keeps its own.

    Raises:
        UsageError: the model reads no captions, or fewer tokens.
    """
    if tokens in (None, spec.caption_tokens):
        return spec
    if not spec.text_conditional:
        raise UsageError("`caption_tokens`: a class-conditional model reads no captions")
    if not 1 <= tokens <= spec.caption_tokens:
        raise UsageError(
            f"`caption_tokens={tokens}`: this model reads at least 1 and at most "
            f"{spec.caption_tokens}"
        )
    if tokens % spec.token_multiple:
        raise UsageError(
            f"`caption_tokens={tokens}`: this model pads captions to a multiple of "
            f"{spec.token_multiple} tokens, so it must be one"
        )
    return replace(spec, caption_tokens=tokens)


def _recognise(checkpoint: Checkpoint, options: ExportOptions) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint in the public layout of its family, and the sizes of the model."""
    names = list(checkpoint.tensors)
    for name, architecture in ARCHITECTURES.items():
        tensors = architecture.in_public_layout(checkpoint.tensors)
        matches = architecture.matches(list(tensors))
        if options.model == name or (options.model == "auto" and matches):
            spec = architecture.spec_from_tensors(tensors, options.num_heads)
            scales = architecture.in_public_layout(checkpoint.scales)
            return replace(checkpoint, tensors=tensors, scales=scales), spec
    raise ModelError(
        f"{checkpoint.path} is not a model that this version knows ({', '.join(ARCHITECTURES)}); "
        f"it has tensors such as {', '.join(names[:3])}"
    )


def _compile_plans(
    spec: ModelSpec, process: Process, options: ExportOptions
) -> dict[str, tuple[Policy, Plan | None]]:
    """Every policy by plan name, with its plan, or None if the policy must be calibrated first."""
    # Raises early for a sampler with which no plan could run.
    table_from_sampler(_sampler(process, options), options.steps, process)
    plans: dict[str, tuple[Policy, Plan | None]] = {}
    for policy in map(parse_policy, options.plans):
        name = check_plan_name(policy.default_name)
        try:
            plan = _compile(policy, name, spec, process, options, None)
        except CalibrationNeededError as cause:
            if not spec.choices:
                raise UsageError(
                    f"plan {name} is made by calibration, but there are no captions; add `captions`"
                ) from cause
            plan = None
        plans.setdefault(name, (policy, plan))
    return plans


def _compile(
    policy: Policy,
    name: str,
    spec: ModelSpec,
    process: Process,
    options: ExportOptions,
    laboratory: Laboratory | None,
) -> Plan:
    schedule = schedule_from_policy(policy, spec, options.steps, laboratory, router_probabilities)
    table = table_from_sampler(_sampler(process, options), schedule.steps, process)
    return compile_schedule(schedule, spec, table, name=name, segments=options.segments)


def _sampler(process: Process, options: ExportOptions) -> str:
    return default_sampler(process) if options.sampler is None else options.sampler


def _calibration(spec: ModelSpec, options: ExportOptions) -> CalibrationOptions:
    images = (
        options.calibrate if options.calibrate is not None else default_images(spec, options.steps)
    )
    scale = cfg_scale_of(options.cfg_scale, spec)
    return CalibrationOptions(images, options.calibration_seed, scale, spec.guided_channels)


def _provenance(
    model: FolderModel,
    name: str | None,
    loras: Sequence[Lora],
    companions: Companions,
    options: ExportOptions,
) -> dict[str, Any]:
    """What the engine directory was made from; ``name`` is the model's id on the Hub."""
    checkpoint = model.checkpoint
    probes = ("diffusers",) if model.scheduler is not None and find_spec("diffusers") else ()
    recorded = asdict(options)
    recorded = {
        name: value.name
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in recorded.items()
    }
    for unrecorded in ("force", "loras", "reuse_engines"):
        del recorded[unrecorded]
    return {
        **companions.provenance,
        "checkpoint": f"{name}@{checkpoint.path.name}" if name else checkpoint.path.name,
        "checkpoint_sha256": digest_of_merge(checkpoint.sha256, loras),
        "weight_set": checkpoint.weight_set,
        "checkpoint_dtypes": checkpoint.dtypes,
        "options": recorded,
        "versions": {
            "goc_deploy": __version__,
            **{package: version(package) for package in (*RECORDED_PACKAGES, *probes)},
        },
    }


def _same_engine(output: Path, provenance: Mapping[str, Any]) -> Manifest | None:
    """The manifest of an engine directory that the same export wrote, or None.

    The sizes of all its files must match, except TensorRT engines, which can be built again.
    """
    try:
        manifest = EngineDir.open(output).manifest
        kept = [entry for entry in manifest.files if not entry.path.startswith("engines/")]
        whole = all((output / entry.path).stat().st_size == entry.size for entry in kept)
    except (OSError, GocError):
        return None
    made_from = {k: v for k, v in manifest.provenance.items() if k != QUANTIZATION}
    return manifest if whole and made_from == provenance else None


def _write_step_graphs(stage: Path, spec: ModelSpec, precision: Precision) -> list[GraphEntry]:
    """Write the graphs of a step that hold no weights of the model."""
    step_graphs = {
        "modulation": modulation_graph(spec, precision),
        "collect": collect_graph(spec, precision),
        "residual": residual_graph(spec, precision),
        **sampler_graphs(spec),
    }
    for name, graph in step_graphs.items():
        onnx.save_model(graph, stage / "onnx" / f"{name}.onnx")
    return [
        GraphEntry(name, f"onnx/{name}.onnx", None, (), False, None, precision)
        for name in step_graphs
    ]


def _check_checkpoints(
    output: Path, checkpoints: Sequence[Checkpoint], precision: Precision
) -> None:
    """Check that there is space for the weights, and that they are finite."""
    model, *companions = (read.nbytes_fp32 for read in checkpoints)
    check_free_space(output, model * ITEM_BYTES[precision] // 4 + sum(companions))
    for read in checkpoints:
        check_values(read)


def _bare_manifest(
    model: FolderModel,
    spec: ModelSpec,
    units: Sequence[GraphEntry],
    provenance: dict[str, Any],
    options: ExportOptions,
) -> Manifest:
    """The manifest of a directory that has units only."""
    return Manifest(
        model=spec,
        precision=options.precision,
        max_batch=options.max_batch,
        graphs=tuple(units),
        predict={},
        plans=(),
        files=(),
        provenance=provenance,
        class_names=model.class_names,
        scheduler=model.scheduler,
    )


def _calibrated(
    manifest: Manifest,
    plans: Mapping[str, tuple[Policy, Plan | None]],
    options: ExportOptions,
    runs: Runs,
) -> list[Plan]:
    """Compile the plans whose policies learn, on the engine directory without plans."""
    spec, process = manifest.model, manifest.process
    laboratory = runs.laboratory(EngineDir(runs.stage, manifest))
    return [
        compiled or _compile(policy, name, spec, process, options, laboratory)
        for name, (policy, compiled) in plans.items()
    ]


def _write_plans(
    stage: Path, manifest: Manifest, plans: Sequence[Plan], backend: Backend
) -> Manifest:
    """Write the plans, then the manifest."""
    for plan in plans:
        manifest = write_plan(
            stage, plan, manifest, lambda path: mapped(stage / path), lambda: backend
        )
    manifest = replace(manifest, files=files_below(stage))
    (stage / MANIFEST_NAME).write_text(manifest_to_json(manifest), encoding="utf-8")
    return manifest
