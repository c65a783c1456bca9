"""The state of a service, for health checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["new", "loading", "ready", "draining", "closed", "failed"]


@dataclass(frozen=True, slots=True)
class Health:
    """The state of a service.

    Attributes:
        state: ``new``, ``loading``, ``ready``, ``draining``, ``closed``, or ``failed`` to start.
        in_flight: requests that run.
        queued: requests that wait.
        last_error: the last error of a run or of the start, or None.
        models: fingerprint, backend and plans of each model, in JSON types.
    """

    state: State
    in_flight: int
    queued: int
    last_error: str | None
    models: Mapping[str, Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)
