"""Writing kinds of graphs: traced once, then written and compared with PyTorch copy by copy."""

from __future__ import annotations

import contextlib
import gc
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engine_dir.weights import mapped_weights
from goc_deploy.exporters.lowering import Template, template_from_kind, write_copy
from goc_deploy.exporters.quantize.copies import quantize_copy
from goc_deploy.exporters.quantize.variants import Variants
from goc_deploy.exporters.units import DTYPES, GraphKind
from goc_deploy.exporters.verification import verify_copy, verify_quantized
from goc_deploy.options import Progress
from goc_deploy.precision import Precision, WeightFormat
from goc_deploy.protocols import Backend, Engine


@contextlib.contextmanager
def _collecting_new_objects_only() -> Iterator[None]:
    """Let the garbage collector skip what exists already, above all the modules of torch.

    Tracing makes many objects in cycles. Going through those of torch each time that some of them
    are collected takes a sixth of the time of an export of a small model.
    """
    if gc.get_freeze_count():  # The program froze its objects; thawing them is up to the program.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def mapped(path: Path) -> memoryview:
    """Map a file of an engine directory that is not yet published."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@dataclass(frozen=True, slots=True)
class UnitWriter:
    """Writes graphs into an engine directory that is not yet published.

    Attributes:
        stage: the directory.
        backend: runs the graphs that were written.
        progress: called with (what, done, total).
        weight_formats: name of a unit -> formats of its quantised weights.
        variants: has the units in these formats, or None to replace them by the one format.
    """

    stage: Path
    backend: Backend
    progress: Progress
    weight_formats: Mapping[str, Sequence[WeightFormat]] = field(default_factory=dict)
    variants: Variants | None = None

    @_collecting_new_objects_only()
    def write(
        self,
        kinds: Sequence[GraphKind],
        tensors: Mapping[str, Tensor],
        precision: Precision,
        folder: str = "onnx",
    ) -> list[GraphEntry]:
        """Write and verify every copy of some kinds of graphs.

        Raises:
            VerificationError: an exported graph differs from PyTorch.
        """
        where = self.stage / folder
        where.mkdir(exist_ok=True)
        total = sum(len(kind.copies) for kind in kinds)
        units: list[GraphEntry] = []
        for kind in kinds:
            self.progress(f"tracing {kind.kind}", len(units), total)
            template = template_from_kind(kind, DTYPES[precision])
            for name in kind.copies:
                self.progress(f"writing {name}", len(units), total)
                parameters = write_copy(template, name, tensors, where)
                error = verify_copy(template, name, parameters, tensors, where, self.backend)
                paths = (f"{folder}/{name}.onnx", f"{folder}/{name}.weights")
                unit = GraphEntry(
                    name, *paths, parameters, kind.weights_are_inputs, error, precision
                )
                units.append(self._quantized(unit, template, where))
            del template
            gc.collect()
        self.progress("done", total, total)
        return units

    def _quantized(self, unit: GraphEntry, template: Template, where: Path) -> GraphEntry:
        """Quantise the weights of a unit that was written and verified, if that is wanted."""
        for wanted in self.weight_formats.get(unit.name, ()):
            folder = where if self.variants is None else self.variants.copy(unit, wanted)
            parameters = quantize_copy(folder, unit.name, unit.parameters, unit.precision, wanted)
            error = verify_quantized(template, unit.name, parameters, folder, self.backend, wanted)
            changed = replace(unit, parameters=parameters, relative_l2=error, weight_format=wanted)
            if self.variants is None:
                return changed
            self.variants.add(changed)
        return unit

    def loaded(self, unit: GraphEntry) -> Engine:
        """Load a graph that was written, with its weights."""
        assert unit.weights_file is not None
        weights = mapped(self.stage / unit.weights_file)
        onnx = memoryview((self.stage / unit.onnx).read_bytes())
        return self.backend.load(onnx, *mapped_weights(unit, weights))
