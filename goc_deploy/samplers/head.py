"""The head: a linear correction of the latents after every step, whose weights are fitted.

A head makes features z of what is at hand after a step, and adds a linear function of them to the
next latents, cell by cell: ``x[k+1] += W[k]^T z[k]``. z is that of
`goc_deploy.samplers.head_features`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from goc_deploy.spec import ModelSpec

HeadFeatures = Literal["scalar", "patch", "hidden", "squares"]
MAX_KEPT = 8  # computed steps that a plan's head may look back


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a head reads. It decides the graph that applies the head.

    Attributes:
        features: ``scalar`` weighs each source by one number; its cell is one latent value.
            ``patch`` mixes the values of a patch; its cell is a token. ``hidden`` also reads the
            tokens before the final layer, and ``squares`` also their squares.
        outputs: number of earlier computed steps whose model outputs are read.
        tokens: number of earlier computed steps whose tokens are read; 0 unless the head
            reads tokens.
        scaled: whether all features are read a second time, multiplied by the guidance scale.
    """

    features: HeadFeatures
    outputs: int = 3
    tokens: int = 0
    scaled: bool = False

    @property
    def signature(self) -> str:
        """The form as a word, such as ``patch3`` or ``hidden3-2s``."""
        tokens = f"-{self.tokens}" if self.reads_tokens else ""
        return f"{self.features}{self.outputs}{tokens}{'s' if self.scaled else ''}"

    @property
    def reads_tokens(self) -> bool:
        """Whether the head reads the tokens before the final layer."""
        return self.features in ("hidden", "squares")

    def cell_values(self, spec: ModelSpec) -> int:
        """Number P of latent values of a cell, which is also the number of values that W adds."""
        return 1 if self.features == "scalar" else spec.patch**2 * spec.channels

    def width(self, spec: ModelSpec) -> int:
        """Number F of features of a cell."""
        images = 1 + 2 * (1 + self.outputs)  # x, and the conditional and unconditional outputs
        of_tokens = 2 * (1 + self.tokens) * spec.hidden if self.reads_tokens else 0
        of_tokens *= 2 if self.features == "squares" else 1
        return (images * self.cell_values(spec) + of_tokens + 1) * (2 if self.scaled else 1)


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted head.

    Attributes:
        form: what it reads.
        cfg_scales: smallest and largest guidance scale that it was fitted for.
        shape: (T, F, P) of the weights.
        weights: little-endian float32 values of W, in C order. W[k] is zero if the fit gained
            nothing at step k.
    """

    form: HeadForm
    cfg_scales: tuple[float, float]
    shape: tuple[int, int, int]
    weights: bytes = field(repr=False)
