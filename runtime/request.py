"""A request to a session: what its images show, and the arrays that the step loop reads of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batch:
    """Shape of one run, which decides all addresses.

    Attributes:
        images: N.
        guided: whether conditional and unconditional rows run together, B = 2N.
        labels: R, distinct labels including the null label; 1 if the model draws captions.
        captions: K, distinct captions.
    """

    images: int
    guided: bool
    labels: int
    captions: int = 0

    @property
    def rows(self) -> int:
        """Rows B of the model's batch."""
        return self.images * (2 if self.guided else 1)
