"""The contract of an architecture: what its module in this folder provides.

``docs/architectures.md`` says what each unit computes and which tensors the runtime offers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from goc_deploy.exporters.units import UnitKind
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec


class SpecFromTensors(Protocol):
    def __call__(self, tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
        """Read the sizes off the tensors of a checkpoint; ``heads`` is what the user gave, or None.

        Raises:
            ModelError: sizes that do not fit each other, or a number of heads that cannot be known.
        """


class CheckTensors(Protocol):
    def __call__(self, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """Check names and shapes in the public layout.

        Raises:
            ModelError: listing what is missing, unexpected, or of another shape.
        """


class UnitKinds(Protocol):
    def __call__(self, spec: ModelSpec, precision: Precision) -> tuple[UnitKind, ...]:
        """The graphs of a model, in the order in which they are written."""


class SpecFromConfig(Protocol):
    def __call__(self, config: Mapping[str, Any], where: str) -> ModelSpec:
        """Read the sizes off a ``config.json``; ``where`` names the file in messages.

        Raises:
            ModelError: naming the setting that is unknown, not supported or out of range.
        """


class StateFromDiffusers(Protocol):
    def __call__(
        self, found: Mapping[str, Tensor], spec: ModelSpec, where: Path
    ) -> tuple[ModelSpec, dict[str, Tensor]]:
        """Rename tensors that diffusers saved to the public layout; the spec gets what only they tell.

        Raises:
            ModelError: listing tensors that are missing or left over.
        """


@dataclass(frozen=True, slots=True)
class DiffusersFolder:
    """How diffusers saves a family.

    Attributes:
        pipelines: pipeline classes whose ``transformer`` folder is read.
        transformer: the model's class in ``config.json``.
        norm_type: the setting that tells the family, because old files name one class for all.
        spec_from_config: sizes from ``config.json``.
        state_from_diffusers: tensors under the names of the public layout.
    """

    pipelines: tuple[str, ...]
    transformer: str
    norm_type: str
    spec_from_config: SpecFromConfig
    state_from_diffusers: StateFromDiffusers


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models.

    Attributes:
        name: as in ``--model`` and `ModelSpec.architecture`.
        telling_tensors: names that only this family has together. Empty if its checkpoints look like another family's,
            which ``--model`` must then tell apart.
        spec_from_tensors: sizes of a checkpoint.
        check_tensors: whether names and shapes are those of the sizes.
        unit_kinds: the graphs.
        folder: how diffusers saves it, or None if diffusers does not have it.
    """

    name: str
    telling_tensors: frozenset[str]
    spec_from_tensors: SpecFromTensors
    check_tensors: CheckTensors
    unit_kinds: UnitKinds
    folder: DiffusersFolder | None = None

    def matches(self, names: Sequence[str]) -> bool:
        """Whether tensors with these names are a checkpoint of the family in its public layout."""
        return bool(self.telling_tensors) and self.telling_tensors <= set(names)
