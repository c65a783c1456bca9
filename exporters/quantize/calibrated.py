"""Quantising units to int8 or fp8, with ranges that are seen as plans run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import FileEntry, GraphEntry, Manifest
from goc_deploy.engine_dir.reading import files_below
from goc_deploy.errors import GocError, ModelError, VerificationError
from goc_deploy.exporters.quantize.copies import (
    checked_products,
    matrix_of,
    quantize_copy,
    stored_values,
)
from goc_deploy.exporters.quantize.products import Product
from goc_deploy.exporters.quantize.selection import block_of
from goc_deploy.exporters.quantize.static import StaticInput, best_alpha, static_input
from goc_deploy.exporters.quantize.statistics import (
    SAMPLED,
    SUMMARY,
    InputStatistics,
    observing_graph,
    output_of,
)
from goc_deploy.exporters.quantize.variants import Variants
from goc_deploy.exporters.quantize.witnesses import Witnesses
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import Observation, ObservingLaboratory
from goc_deploy.precision import DTYPE_OF_FORMAT, DTYPE_OF_PRECISION, WeightFormat
from goc_deploy.protocols import Backend

OBSERVING = "observing"  # folder of the graphs, which is removed at the end

Seen = dict[str, dict[str, InputStatistics]]  # unit -> weight of a product -> its input
Records = dict[WeightFormat, dict[str, Any]]  # format -> unit -> what was seen and chosen


@dataclass(frozen=True, slots=True)
class _OfFormat:
    """What units are quantised with.

    Attributes:
        name: the format.
        products: unit -> its products.
        seen: what was seen of them.
        alphas: (kind of unit, weight) -> migration strength.
    """

    name: WeightFormat
    products: Mapping[str, Sequence[Product]]
    seen: Seen
    alphas: Mapping[tuple[str, str], float | None]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """Quantises units of an engine directory that is not yet published.

    Attributes:
        stage: the directory.
        manifest: its manifest, with all units in the precision.
        units: names of the units to quantise.
        formats: calibrated formats, one if there are no ``variants``.
        backend: runs the quantised units on what the units were seen to compute.
        progress: called with (what, done, total).
        variants: gets the units in these formats, or None to replace them.
    """

    stage: Path
    manifest: Manifest
    units: Collection[str]
    formats: Sequence[WeightFormat]
    backend: Backend
    progress: Progress
    variants: Variants | None = None

    def quantize(
        self, plans: Sequence[Plan], make_laboratory: Callable[[EngineDir], ObservingLaboratory]
    ) -> tuple[Manifest, Records]:
        """Run the plans, choose the ranges, and quantise the units.

        Args:
            plans: plans whose computed steps are seen.
            make_laboratory: makes what runs them.

        Returns:
            The manifest, with the quantised units if they were replaced, whose list of files is
            unchanged; and for each format what was seen and chosen, as plain data.

        Raises:
            ModelError: a unit has no product that can be quantised, or nothing but zeros was seen.
            VerificationError: a value is not finite, or a quantised unit is too far off.
        """
        folder = self.stage / OBSERVING
        folder.mkdir()
        try:
            products, files = self._write_observing(folder)
            witnesses = Witnesses(folder)
            seen = self._observe(plans, make_laboratory, products, files, witnesses)
            manifest, records = self.manifest, {}
            for wanted in self.formats:
                alphas = dict(self._alphas(products, seen, wanted))
                of_format = _OfFormat(wanted, products, seen, alphas)
                manifest, records[wanted] = self._quantized(of_format, witnesses)
            return manifest, records
        finally:
            shutil.rmtree(folder)

    def _units(self) -> Iterator[GraphEntry]:
        return (unit for unit in self.manifest.graphs if unit.name in self.units)

    def _write_observing(
        self, folder: Path
    ) -> tuple[dict[str, tuple[Product, ...]], list[FileEntry]]:
        """Write the graphs that show the inputs of products, and find these products."""
        products = {}
        for unit in self._units():
            model = onnx.load(self.stage / unit.onnx, load_external_data=False)
            products[unit.name] = checked_products(model, unit.name, self.formats[0])
            graph = observing_graph(model, products[unit.name])
            onnx.save_model(graph, folder / f"{unit.name}.onnx")
        files = [replace(file, path=f"{OBSERVING}/{file.path}") for file in files_below(folder)]
        return products, files

    def _observe(
        self,
        plans: Sequence[Plan],
        make_laboratory: Callable[[EngineDir], ObservingLaboratory],
        products: Mapping[str, Sequence[Product]],
        files: Sequence[FileEntry],
        witnesses: Witnesses,
    ) -> Seen:
        manifest = self.manifest
        graphs = tuple(
            replace(unit, onnx=f"{OBSERVING}/{unit.name}.onnx") if unit.name in products else unit
            for unit in manifest.graphs
        )
        observing = replace(manifest, graphs=graphs, files=(*manifest.files, *files))
        laboratory = make_laboratory(EngineDir(self.stage, observing))
        more = {
            unit: {output_of(p): (SUMMARY + SAMPLED, p.shape[0]) for p in of_unit}
            for unit, of_unit in products.items()
        }
        seen: Seen = {
            unit: {p.weight: InputStatistics(np.zeros(p.shape[0], np.float32)) for p in of_unit}
            for unit, of_unit in products.items()
        }
        for plan in plans:
            middle = plan.sampler.steps // 2

            def see(run: Observation, plan: Plan = plan, middle: int = middle) -> None:
                for product in products[run.unit]:
                    try:
                        seen[run.unit][product.weight].add(run.more[output_of(product)])
                    except VerificationError as cause:
                        raise VerificationError(
                            f"unit {run.unit}: the input of {product.weight} has {cause} in step "
                            f"{run.step} of plan {plan.name}; check the weights, or try "
                            "`precision=fp32`"
                        ) from cause
                if run.step >= middle:
                    witnesses.keep(run)

            laboratory.observe(plan.schedule, plan.sampler, more, see)
        return seen

    def _alphas(
        self, products: Mapping[str, Sequence[Product]], seen: Seen, wanted: WeightFormat
    ) -> Iterator[tuple[tuple[str, str], float | None]]:
        """Choose the migration strength of every kind of product: (kind of unit, weight)."""
        dtype, units = DTYPE_OF_PRECISION[self.manifest.precision], list(self._units())
        kinds = dict.fromkeys((kind_of(u.name), p.weight) for u in units for p in products[u.name])
        for done, (kind, weight) in enumerate(kinds):
            self.progress(f"smoothing {kind} {weight}", done, len(kinds))
            of_kind = [unit for unit in units if kind_of(unit.name) == kind]
            if wanted != "int8+smooth":
                yield (kind, weight), None
                continue
            pairs = (
                (seen[unit.name][weight], self._matrix(unit, product))
                for unit in of_kind
                for product in products[unit.name]
                if product.weight == weight
            )
            yield (kind, weight), best_alpha(pairs, dtype)

    def _matrix(self, unit: GraphEntry, product: Product) -> np.ndarray:
        """The weight (K, N) of a product in float32."""
        (parameter,) = (p for p in unit.parameters if p.name == product.weight)
        path = self.stage / str(unit.weights_file)
        return matrix_of(stored_values(path, parameter, unit.precision), product, unit.precision)

    def _quantized(
        self, wanted: _OfFormat, witnesses: Witnesses
    ) -> tuple[Manifest, dict[str, Any]]:
        graphs: list[GraphEntry] = []
        record: dict[str, Any] = {}
        for unit in self.manifest.graphs:
            if unit.name not in self.units:
                graphs.append(unit)
                continue
            self.progress(f"quantising {unit.name}", len(record), len(self.units))
            static = self._static(unit, wanted)
            graphs.append(self._written(unit, wanted.name, static, witnesses))
            seen = wanted.seen[unit.name]
            record[unit.name] = {
                weight: {
                    "largest": float(seen[weight].largest.max()),
                    "scale": kept.scale,
                    "clip": kept.clip,
                    "alpha": kept.alpha,
                    "runs": seen[weight].runs,
                }
                for weight, kept in static.items()
            }
        return replace(self.manifest, graphs=tuple(graphs)), record

    def _written(
        self,
        unit: GraphEntry,
        wanted: WeightFormat,
        static: Mapping[str, StaticInput],
        witnesses: Witnesses,
    ) -> GraphEntry:
        """Quantise the files of a unit, or copies of them; return its entry in the manifest."""
        folder = self.stage / Path(unit.onnx).parent
        if self.variants is not None:
            folder = self.variants.copy(unit, wanted)
        parameters = quantize_copy(
            folder, unit.name, unit.parameters, unit.precision, wanted, static
        )
        changed = replace(unit, parameters=parameters, weight_format=wanted)
        error = witnesses.error(changed, folder, self.backend)
        changed = replace(changed, relative_l2=error)
        if self.variants is None:
            return changed
        self.variants.add(changed)
        return unit

    def _static(self, unit: GraphEntry, wanted: _OfFormat) -> dict[str, StaticInput]:
        """Choose how the inputs of the products of a unit are quantised."""
        dtype, values = DTYPE_OF_PRECISION[unit.precision], DTYPE_OF_FORMAT[wanted.name]
        static = {}
        for product in wanted.products[unit.name]:
            weight = product.weight
            inputs, alpha = (
                wanted.seen[unit.name][weight],
                wanted.alphas[kind_of(unit.name), weight],
            )
            try:
                inputs.check()
                static[weight] = static_input(
                    inputs, self._matrix(unit, product), dtype, alpha, values
                )
            except GocError as cause:
                raise ModelError(
                    f"unit {unit.name}: the input of {weight} cannot be quantised, because "
                    f"{cause}; add `quantize_exclude={unit.name}`"
                ) from cause
        return static


def kind_of(unit: str) -> str:
    """``mlp`` of ``block_03_mlp``."""
    return unit.removeprefix(block_of(unit)).lstrip("_")
