"""Export with its options in one object: where the exporter meets a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from goc_deploy.api.engines import cpu_backend
from goc_deploy.api.requirements import require
from goc_deploy.options import ExportOptions, Progress, no_progress

if TYPE_CHECKING:
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engine_dir.manifest import Manifest
    from goc_deploy.policies.calibration import CalibrationOptions, ObservingLaboratory


def export_with(
    checkpoint: Path, output: Path, options: ExportOptions, progress: Progress = no_progress
) -> tuple[Manifest, bool]:
    """Export a checkpoint to an engine directory, as `goc_deploy.export`.

    Returns:
        The manifest, and whether anything was written (False: an equal engine directory was there).

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    from goc_deploy.disk import check_parent
    from goc_deploy.engine_dir.reading import holds_engine

    check_parent(output)  # this and the next line before torch is imported
    holds_engine(output)
    require("export", "torch", "onnx", "onnxscript", "safetensors")
    if options.text_encoder is not None:
        require("text", "tokenizers")
    source = _source_of_engines(output, options)
    from goc_deploy.api.laboratory import EngineLaboratory
    from goc_deploy.exporters.export import export_checkpoint

    backend = cpu_backend()

    def laboratory(
        directory: EngineDir, sampler: str, images: CalibrationOptions
    ) -> ObservingLaboratory:
        return EngineLaboratory(directory, lambda: backend, sampler, images, progress)

    exported = export_checkpoint(checkpoint, output, options, backend, laboratory, progress)
    if source is None:
        return exported
    from goc_deploy.engines.tensorrt.reuse import copy_engines

    directory, copied = copy_engines(output, source, progress)
    return directory.manifest, exported[1] or copied > 0


def _source_of_engines(output: Path, options: ExportOptions) -> EngineDir | None:
    """Open the directory whose engines are reused, and check what can be checked in advance."""
    if options.reuse_engines is None:
        return None
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.tensorrt.reuse import check_source

    source = EngineDir.open(options.reuse_engines)
    check_source(source, output, options)
    return source
