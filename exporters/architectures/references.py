"""Models that edit images, made of models that draw them.

Such a model sees the tokens of the image and those of reference images as one sequence, with the
same weights and modulation. Outside of the units the two are apart: tokens of references start
every step anew, and nothing reads them after the last attention, as it is with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from goc_deploy.blocks import REFERENCE_FEATURE, TEXT_FEATURE, TokenStream, Unit
from goc_deploy.exporters.tracing import ROWS, Examples, empty_module
from goc_deploy.exporters.units import DTYPES, GraphKind, Input
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

SOME_REFERENCE_TOKENS = 17  # of example inputs
# An input of a unit: that of the references which is joined to it, and the axis of the tokens.
JOINED = {"x": ("reference", 1), "cos": ("reference_cos", 0), "sin": ("reference_sin", 0)}
STREAM: TokenStream = "reference"


def reading_references(spec: ModelSpec) -> ModelSpec:
    """The model in which units that read the text also read a reference, and change it likewise."""

    def read(unit: Unit) -> Unit:
        if "text" not in unit.reads:
            return unit
        changes = (REFERENCE_FEATURE,) if TEXT_FEATURE in unit.features else ()
        reads = (*unit.reads, STREAM)
        return replace(unit, features=(*unit.features, *changes), reads=reads)

    blocks = tuple(replace(run, units=tuple(map(read, run.units))) for run in spec.blocks)
    return replace(spec, blocks=blocks, max_references=1)


def without_references(spec: ModelSpec) -> ModelSpec:
    """The opposite of `reading_references`."""

    def read(unit: Unit) -> Unit:
        return replace(
            unit,
            features=tuple(feature for feature in unit.features if feature.stream != STREAM),
            reads=tuple(stream for stream in unit.reads if stream != STREAM),
        )

    blocks = tuple(replace(run, units=tuple(map(read, run.units))) for run in spec.blocks)
    return replace(spec, blocks=blocks, max_references=0, references=())


def kinds_with_references(
    kinds: Sequence[GraphKind], spec: ModelSpec, precision: Precision
) -> tuple[GraphKind, ...]:
    """The graphs of a model that reads references.

    Args:
        kinds: those of the model `without_references`, whose embedding is a linear layer.
        spec: sizes of the model.
        precision: precision of the graphs.
    """
    examples = Examples(spec, DTYPES[precision])
    units = dict(zip(spec.unit_names, spec.declared_units, strict=True))
    made = []
    for kind in kinds:
        name = next(iter(kind.copies))
        if name == "conditioning":
            made.append(_wrapped(kind, RepeatedRows(kind.module, _places(spec))))
        elif name in units and STREAM in units[name].reads:
            made.append(_unit_kind(kind, units[name], spec, examples))
        else:
            made.append(kind)
        if name == "embed":
            made.append(_references_kind(kind, spec, examples))
    return tuple(made)


def _wrapped(kind: GraphKind, module: nn.Module) -> GraphKind:
    """The kind of a module that has the module of another kind as ``unit``."""
    copies = {
        copy: {f"unit.{name}": slabs for name, slabs in binding.items()}
        for copy, binding in kind.copies.items()
    }
    return replace(kind, module=module, copies=copies)


def _unit_kind(kind: GraphKind, unit: Unit, spec: ModelSpec, examples: Examples) -> GraphKind:
    """The kind of a unit that reads references."""
    count, pairs = SOME_REFERENCE_TOKENS, spec.hidden // spec.heads // 2
    angles = torch.linspace(-2, 3, count)[:, None] * torch.linspace(1, 0.1, pairs)
    values = {
        "x": (examples.normal(2, count, spec.hidden), {0: "batch", 1: "reference_tokens"}),
        "cos": (angles.cos(), {0: "reference_tokens"}),
        "sin": (angles.sin(), {0: "reference_tokens"}),
    }
    names = [given.name for given in kind.inputs]
    more = [Input(JOINED[name][0], *values[name]) for name in names if name in JOINED]
    module = ReferencingUnit(
        kind.module, names, kind.outputs, changes=REFERENCE_FEATURE in unit.features
    )
    return replace(_wrapped(kind, module), inputs=(*kind.inputs, *more), outputs=module.outputs)


def _references_kind(embed: GraphKind, spec: ModelSpec, examples: Examples) -> GraphKind:
    """The kind of the graph that embeds references, with the weights of the embedding."""
    shape = (2, SOME_REFERENCE_TOKENS, spec.patch_values)
    dynamic = {0: "images", 1: "reference_tokens"}
    patches = Input("patches", examples.normal(*shape, dtype=torch.float32), dynamic)
    (binding,) = embed.copies.values()
    own = {name.removeprefix("x_embedder."): slabs for name, slabs in binding.items()}
    dtype = next(embed.module.parameters()).dtype
    module = empty_module(lambda: ReferencesUnit(spec), dtype, examples.generator)
    return GraphKind("references", module, (patches, ROWS), (STREAM,), {"references": own})


def _places(spec: ModelSpec) -> list[int]:
    """For each row of the table, its row in that of the model without references.

    The gates of references, which are those of the image, follow the other gates.
    """
    plain = without_references(spec).modulation
    others, own = len(plain.gates), len(spec.modulation.gates)
    of_image = {
        place.unit: index
        for index, place in enumerate(spec.features)
        if place.feature.output == "feature"
    }
    references = [of_image[place.unit] for place in spec.features[others:own]]
    return [*plain.gates, *references, *range(others, plain.count)]


class RepeatedRows(nn.Module):
    """A conditioning whose table has rows of another one, some of them twice.

    Args:
        unit: the conditioning of that table.
        places: for each row of the table, its row in the other one.
    """

    def __init__(self, unit: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.unit, self.places = unit, tuple(places)

    def forward(self, *given: Tensor) -> Tensor:
        """The inputs of the other conditioning to the table (S, M, R, D)."""
        table: Tensor = self.unit(*given)
        return table.index_select(1, torch.tensor(self.places))


class ReferencesUnit(nn.Module):
    """Patches of reference images to the tokens with which every step starts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.patch_values, spec.hidden)

    def forward(self, patches: Tensor, rows: Tensor) -> Tensor:
        """Patches (N, R, C*p*p) float32 and the image (B,) of each row to tokens (B, R, D)."""
        images, tokens, values = patches.shape
        embedded = self.proj(patches.reshape(-1, values).to(self.proj.weight.dtype))
        return embedded.reshape(images, tokens, -1).index_select(0, rows)


class ReferencingUnit(nn.Module):
    """A unit that sees the tokens of the image and of references as one sequence.

    Args:
        unit: the unit of the model without references.
        names: names of its inputs, in order.
        outputs: names of its outputs.
        changes: whether the references are changed too.

    Attributes:
        outputs: names of the outputs.
    """

    def __init__(
        self, unit: nn.Module, names: Sequence[str], outputs: Sequence[str], *, changes: bool
    ) -> None:
        super().__init__()
        self.unit, self._names, self._made = unit, tuple(names), tuple(outputs)
        self._more = tuple(JOINED[name][0] for name in names if name in JOINED)
        of_references = ("reference_out", "feature_reference") if changes else ()
        self.outputs = (*outputs, *of_references)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the unit, then those of references, to the outputs.

        Those of references are ``reference`` (B, R, D), and ``reference_cos`` and ``reference_sin``
        (R, head width / 2) float32 if the unit turns queries and keys. More outputs are
        ``reference_out`` (B, R, D) and ``feature_reference`` (B*R, D).
        """
        inputs = self._named(given)
        return self._apart(self.unit(*self._together(inputs)), inputs)

    def reference(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The same tensors, by the method of this name of the unit if it has one."""
        inputs = self._named(given)
        other = getattr(self.unit, "reference", self.unit)
        return self._apart(other(*self._together(inputs)), inputs)

    def _named(self, given: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((*self._names, *self._more), given, strict=True))

    def _together(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The inputs of the unit, with the tokens of references behind those of the image."""
        joined = {
            name: torch.cat([inputs[name], inputs[other]], dim=axis)
            for name, (other, axis) in JOINED.items()
            if name in inputs
        }
        return [joined.get(name, inputs[name]) for name in self._names]

    def _apart(self, made: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the unit (B, T + R, D), cut behind the tokens of the image."""
        outputs = dict(zip(self._made, made, strict=True))
        batch, tokens, hidden = inputs["x"].shape
        x, feature = outputs["x_out"], outputs["feature"].reshape(batch, -1, hidden)
        outputs["x_out"], outputs["reference_out"] = x[:, :tokens], x[:, tokens:]
        outputs["feature"] = feature[:, :tokens].reshape(-1, hidden)
        outputs["feature_reference"] = feature[:, tokens:].reshape(-1, hidden)
        return tuple(outputs[name] for name in self.outputs)
