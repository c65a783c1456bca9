"""The contract of an architecture: the functions that its module in this folder provides.

``docs/architectures.md`` describes what each graph computes and which tensors the runtime offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from goc_deploy.exporters.units import GraphKind
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions


class SpecFromTensors(Protocol):
    """The type of `Architecture.spec_from_tensors`."""

    def __call__(self, tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
        """Infer the sizes of a model from the tensors of a checkpoint.

        Args:
            tensors: the checkpoint, in the public layout.
            heads: number of attention heads that the user requests, or None to infer it.

        Raises:
            ModelError: the sizes are not consistent, or the number of heads cannot be inferred.
        """


class CheckTensors(Protocol):
    """The type of `Architecture.check_tensors`."""

    def __call__(self, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """Check names and shapes in the public layout.

        Raises:
            ModelError: tensors are missing, unexpected, or of another shape; the message lists
                them.
        """


class GraphKinds(Protocol):
    """The type of `Architecture.graph_kinds`."""

    def __call__(self, spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
        """The graphs of a model, in the order in which they are written."""


class SpecFromConfig(Protocol):
    """The type of `DiffusersFolder.spec_from_config`."""

    def __call__(self, config: Mapping[str, Any], where: str) -> ModelSpec:
        """Read the sizes of a model from a ``config.json``; ``where`` names the file in messages.

        Raises:
            ModelError: a setting is unknown, not supported or out of range; the message names it.
        """


class StateFromDiffusers(Protocol):
    """The type of `DiffusersFolder.state_from_diffusers`."""

    def __call__(
        self, tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
    ) -> tuple[ModelSpec, dict[str, Tensor]]:
        """Rename tensors that diffusers saved to the public layout.

        Returns:
            The spec, completed by what only the tensors show, and the renamed tensors.

        Raises:
            ModelError: tensors are missing or left over; the message lists them.
        """


class LayersInDiffusers(Protocol):
    """The type of `DiffusersFolder.layers`."""

    def __call__(self, spec: ModelSpec) -> Mapping[str, tuple[str, ...]]:
        """Layers in the public layout -> the layers in diffusers whose rows each one joins.

        A layer that diffusers has several times, but the export only once, is left out.
        """


def no_other_names(spec: ModelSpec) -> Mapping[str, tuple[str, ...]]:  # noqa: ARG001
    """The layers of a family whose public layout is that of diffusers."""
    return {}


def same_names(
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    where: Path,  # noqa: ARG001
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of such a family, which `Architecture.check_tensors` checks."""
    return spec, dict(tensors)


def own_positions(spec: ModelSpec) -> Positions:
    """The positions of a model whose spec has them for every size."""
    assert spec.positions is not None
    return spec.positions


@dataclass(frozen=True, slots=True)
class DiffusersFolder:
    """How diffusers saves a family.

    Attributes:
        pipelines: pipeline classes whose ``transformer`` folder is read.
        transformer: the model's class in ``config.json``.
        spec_from_config: reads the sizes from ``config.json``.
        state_from_diffusers: renames the tensors to the public layout.
        norm_type: value of the setting that distinguishes families in old files, which have the
            same class for all; empty if there are none of the family.
        layers: names of the layers in both layouts, for LoRAs. A family whose public layout is
            that of diffusers may have the names of its authors here.
        even_sigmas: whether the pipelines give their scheduler T even noise levels from 1 to 1 / T.
        fitted_shift: whether they compute the shift for the size with the fit of FLUX.2.
    """

    pipelines: tuple[str, ...]
    transformer: str
    spec_from_config: SpecFromConfig
    state_from_diffusers: StateFromDiffusers = same_names
    norm_type: str = ""
    layers: LayersInDiffusers = no_other_names
    even_sigmas: bool = False
    fitted_shift: bool = False


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """Another layout in which single files of a family exist.

    Attributes:
        telling_tensors: tensor names that together identify the layout.
        state: renames the tensors of such a file to the public layout. It raises ModelError if
            tensors are missing, unexpected or of another shape.
    """

    telling_tensors: frozenset[str]
    state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models.

    Attributes:
        name: name of the family in ``--model`` and `ModelSpec.architecture`.
        telling_tensors: tensor names that together identify the family. Empty if its checkpoints
            look like those of another family; then ``--model`` must select it.
        spec_from_tensors: infers the sizes from a checkpoint.
        check_tensors: checks that names and shapes fit the sizes.
        graph_kinds: returns the graphs.
        positions: returns the positions from which the model's table was made, for samples of other
            sizes; by default those of the spec.
        folder: how diffusers saves the family, or None if diffusers does not have it.
        other_layout: another layout of its single files, or None.
        sensitive: patterns of the units that formats of quantised activations leave out by default
            (`goc_deploy.exporters.quantize.selection`).
    """

    name: str
    telling_tensors: frozenset[str]
    spec_from_tensors: SpecFromTensors
    check_tensors: CheckTensors
    graph_kinds: GraphKinds
    positions: Callable[[ModelSpec], Positions] = own_positions
    folder: DiffusersFolder | None = None
    other_layout: OtherLayout | None = None
    sensitive: tuple[str, ...] = ()

    def matches(self, names: Sequence[str]) -> bool:
        """Whether these are the tensor names of a checkpoint of the family in its public layout."""
        return bool(self.telling_tensors) and self.telling_tensors <= set(names)

    def in_public_layout(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file of the family, renamed if they have the other layout.

        Raises:
            ModelError: the layout is the other one, but the tensors do not fit it.
        """
        other = self.other_layout
        if other is None or not other.telling_tensors <= tensors.keys():
            return tensors
        return other.state(tensors)
