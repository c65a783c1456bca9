"""Checkpoint to engine directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from goc_deploy.errors import CalibrationNeededError, GocError, UsageError
from goc_deploy.exporters.checkpoint import Checkpoint, check_values
from goc_deploy.exporters.companions.attach import write_companions
from goc_deploy.exporters.graphs.plan_files import write_plan
from goc_deploy.exporters.graphs.step import (
    collect_graph,
    modulation_graph,
    residual_graph,
    sampler_graphs,
)
from goc_deploy.exporters.hub import folder_from_hub, hub_id
from goc_deploy.exporters.lora.reading import digest_of_merge
from goc_deploy.exporters.quantize.job import QUANTIZATION, Quantization, Runs, quantization_of
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.exporters.source import Source, read_source
from goc_deploy.exporters.unit_files import UnitWriter, mapped
from goc_deploy.exporters.weight_sets import with_second_set
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
    source = read_source(folder_from_hub(name) if name else checkpoint_path, options)
    spec = source.spec
    calibrates = options.precision != "bf16" and spec.choices > 0 and not spec.boundary
    options = replace(
        options,
        plans=options.plans or default_plans(calibrates=calibrates),
        cfg_scale=cfg_scale_of(options.cfg_scale, spec),
    )
    process = Process(spec.prediction_type, source.model.scheduler, spec.tokens)
    quantization = quantization_of(options, spec, source.architecture.sensitive)
    plans = _compile_plans(spec, process, options)
    check_options(_calibration(spec, options))
    job = _Job(source, options, process, quantization, plans, _provenance(source, name, options))
    with directory_lock(output):
        present = _same_engine(output, job.provenance)
        if present:
            return present, False
        check_target(output, force=options.force)
        _check_checkpoints(output, source.checkpoints, options.precision)
        with staged(output) as stage:
            manifest = _write(stage, job, backend, make_laboratory, progress)
    return manifest, True


@dataclass(frozen=True, slots=True)
class _Job:
    """An export whose options are checked and filled in.

    Attributes:
        source: what is exported.
        options: export options, without defaults that depend on the model.
        process: the diffusion process of the model.
        quantization: what is quantised.
        plans: every policy by plan name, with its plan, or None if it must be calibrated first.
        provenance: what the engine directory is made from.
    """

    source: Source
    options: ExportOptions
    process: Process
    quantization: Quantization
    plans: Mapping[str, tuple[Policy, Plan | None]]
    provenance: dict[str, Any]


def _write(
    stage: Path,
    job: _Job,
    backend: Backend,
    make_laboratory: LaboratoryMaker,
    progress: Progress,
) -> Manifest:
    """Write all files of an engine directory to a folder that is not published yet."""
    source, options, spec = job.source, job.options, job.source.spec
    variants = job.quantization.variants(stage)
    writer = UnitWriter(stage, backend, progress, job.quantization.while_writing, variants)
    kinds = source.architecture.graph_kinds(spec, options.precision)
    kinds = with_second_set(kinds) if spec.boundary else kinds
    units = writer.write(kinds, source.tensors, options.precision)
    units += _write_step_graphs(stage, spec, options.precision)
    bare = write_companions(source.companions, _bare_manifest(job, units), options, writer)
    entries = tuple(lora.entry for lora in source.loras)
    bare = replace(bare, files=files_below(stage), loras=entries)
    sampler, images = _sampler(job.process, options), _calibration(spec, options)
    runs = Runs(
        stage,
        sampler,
        images,
        lambda directory: make_laboratory(directory, sampler, images),
        backend,
        progress,
    )
    compiled = _calibrated(bare, job.plans, options, runs)
    bare = job.quantization.applied(bare, variants, compiled, runs)
    return _write_plans(stage, bare, compiled, backend)


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


def _provenance(source: Source, name: str | None, options: ExportOptions) -> dict[str, Any]:
    """What the engine directory was made from; ``name`` is the model's id on the Hub."""
    model, checkpoint = source.model, source.model.checkpoint
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
        **source.companions.provenance,
        "checkpoint": f"{name}@{checkpoint.path.name}" if name else checkpoint.path.name,
        "checkpoint_sha256": digest_of_merge(checkpoint.sha256, source.loras),
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


def _bare_manifest(job: _Job, units: Sequence[GraphEntry]) -> Manifest:
    """The manifest of a directory that has units only."""
    model, options = job.source.model, job.options
    return Manifest(
        model=job.source.spec,
        precision=options.precision,
        max_batch=options.max_batch,
        graphs=tuple(units),
        predict={},
        plans=(),
        files=(),
        provenance=job.provenance,
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
