"""What an export quantises, and the steps from units in the precision to quantised ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.exporters.quantize.bounded import check_bounded, formats_within
from goc_deploy.exporters.quantize.calibrated import Quantizer, Records
from goc_deploy.exporters.quantize.selection import (
    check_calibrated,
    checked_formats,
    patterns_of,
    quantized_units,
)
from goc_deploy.exporters.quantize.variants import Choice, Variants
from goc_deploy.options import ExportOptions, Progress
from goc_deploy.policies.calibration import CalibrationOptions, ObservingLaboratory
from goc_deploy.precision import CALIBRATED_FORMATS, WeightFormat
from goc_deploy.protocols import Backend
from goc_deploy.spec import SECOND_SET, ModelSpec

QUANTIZATION = "quantization"  # key of the provenance that the export itself finds out


@dataclass(frozen=True, slots=True)
class Runs:
    """How calibration runs plans on an engine directory that is not yet published.

    Attributes:
        stage: the directory.
        sampler: sampler SPEC.
        images: the calibration images.
        laboratory: makes what runs them on the directory.
        backend: runs the graphs.
        progress: called with (what, done, total).
    """

    stage: Path
    sampler: str
    images: CalibrationOptions
    laboratory: Callable[[EngineDir], ObservingLaboratory]
    backend: Backend
    progress: Progress


@dataclass(frozen=True, slots=True)
class Quantization:
    """What an export quantises.

    Attributes:
        formats: the formats that units may have: none, one, or several with a bound.
        units: names of the units that may be quantised, in the order of a step.
        bound: the largest error of plans, see `goc_deploy.exporters.quantize.budget.Budget`, or
            None to quantise all of these units.
    """

    formats: tuple[WeightFormat, ...]
    units: tuple[str, ...]
    bound: float | None

    @property
    def while_writing(self) -> dict[str, tuple[WeightFormat, ...]]:
        """Unit -> formats that it is quantised to when it is written."""
        formats = tuple(f for f in self.formats if f not in CALIBRATED_FORMATS)
        return dict.fromkeys(self.units, formats)

    def variants(self, stage: Path) -> Variants | None:
        """Return what keeps units in several formats, if they are needed."""
        return None if self.bound is None else Variants(stage)

    def applied(
        self, written: Manifest, variants: Variants | None, plans: Sequence[Plan], runs: Runs
    ) -> Manifest:
        """Quantise to calibrated formats, choose the formats within the bound, and record both.

        Args:
            written: manifest of the units as they were written.
            variants: what `variants` returned.
            plans: the plans of the export.
            runs: how they run.

        Raises:
            ModelError, UsageError, VerificationError: see `Quantizer.quantize` and
                `formats_within`.
        """
        calibrated = tuple(f for f in self.formats if self.units and f in CALIBRATED_FORMATS)
        if not calibrated and self.bound is None:
            return written
        choice: Choice = dict.fromkeys(self.units, self.formats[0])
        record: dict[str, Any] = {**asdict(runs.images), "sampler": runs.sampler}
        records: Records = {}
        manifest = written
        if calibrated:
            quantizer = Quantizer(
                runs.stage, manifest, self.units, calibrated, runs.backend, runs.progress, variants
            )
            manifest, records = quantizer.quantize(plans, runs.laboratory)
        if self.bound is not None and variants is not None:
            budget = formats_within(
                self.bound,
                manifest,
                variants,
                plans,
                lambda directory: runs.laboratory(directory).trials(),
                runs.images,
                runs.progress,
            )
            choice, record["budget"] = budget.formats, asdict(budget)
            manifest = variants.install(manifest, choice)
        if calibrated:
            record |= {"plans": [plan.name for plan in plans], "units": _of_choice(records, choice)}
        return replace(manifest, provenance={**manifest.provenance, QUANTIZATION: record})


def quantization_of(
    options: ExportOptions, spec: ModelSpec, sensitive: tuple[str, ...]
) -> Quantization:
    """Read what an export quantises from its options.

    Args:
        options: the options.
        spec: the model.
        sensitive: `Architecture.sensitive` of its family.

    Raises:
        UsageError: options that do not go together, or with the model.
    """
    bounded = options.max_error is not None
    formats = checked_formats(options.quantize, options.quantize_exclude, bounded=bounded)
    units: tuple[str, ...] = ()
    if formats:
        # A bound measures what the defaults only suppose.
        of_defaults = () if bounded else formats
        patterns = patterns_of(options.quantize_exclude, of_defaults, sensitive, spec.unit_names)
        units = quantized_units(spec.unit_names, patterns)
        check_calibrated(formats if units else (), options.precision, choices=spec.choices)
    if bounded:
        check_bounded(options, spec, units)
    if spec.boundary:
        units += tuple(f"{SECOND_SET}{name}" for name in units)
    return Quantization(formats, units, options.max_error)


def _of_choice(records: Records, choice: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """What was seen and chosen of the units that are quantised to a calibrated format."""
    return {unit: records[wanted][unit] for unit, wanted in choice.items() if wanted in records}
