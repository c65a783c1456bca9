"""The contract of an architecture: what its module in this folder gives, and what all of them share.

``docs/architectures.md`` says what each unit computes and which tensors the runtime offers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from goc_deploy.exporters.units import UnitKind
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec


class Architecture(Protocol):
    """A family of models. A module implements it: its functions are these methods.

    Attributes:
        PIPELINES: diffusers' pipeline classes whose ``transformer`` folder it reads.
    """

    PIPELINES: tuple[str, ...]

    def matches(self, names: Sequence[str]) -> bool:
        """Whether tensors with these names are a checkpoint of the family in its public layout."""
        ...

    def spec_from_tensors(self, tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
        """Sizes of a checkpoint; ``heads`` where somebody gave them.

        Raises:
            ModelError: sizes that do not fit each other, or heads that cannot be known.
        """
        ...

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` that diffusers wrote is of the family."""
        ...

    def spec_from_config(self, config: Mapping[str, Any], where: str) -> ModelSpec:
        """Sizes that a ``config.json`` gives.

        Raises:
            ModelError: naming the setting that is unknown, not supported or out of range.
        """
        ...

    def state_from_diffusers(
        self, found: Mapping[str, Tensor], spec: ModelSpec, where: Path
    ) -> tuple[ModelSpec, dict[str, Tensor]]:
        """Tensors that diffusers saved under the names of the public layout, and the spec with what only they tell.

        Raises:
            ModelError: listing tensors that are missing or left over.
        """
        ...

    def check_tensors(self, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """Check names and shapes in the public layout.

        Raises:
            ModelError: listing what is missing, unexpected, or of another shape.
        """
        ...

    def unit_kinds(self, spec: ModelSpec, precision: Precision) -> tuple[UnitKind, ...]:
        """The graphs of a model, in the order in which they are written."""
        ...
