"""The contract of an architecture: what its module in this folder gives, and what all of them share.

``docs/architectures.md`` says what each unit computes and which tensors the runtime offers it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.units import Input, Slab, UnitKind
from goc_deploy.spec import ModelSpec

SEED = 0  # of example inputs
SMALL = 4096  # elements; the ONNX optimiser merges equal initializers of up to 1024
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Module = TypeVar("Module", bound=nn.Module)


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

    def unit_kinds(self, spec: ModelSpec, precision: str) -> tuple[UnitKind, ...]:
        """The graphs of a model, in the order in which they are written."""
        ...


class Examples:
    """Example inputs of the units, from one seed.

    Args:
        spec: the model.
        dtype: of tokens and modulation.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec, self._dtype = spec, dtype
        self.generator = torch.Generator().manual_seed(SEED)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator).to(dtype or self._dtype)

    def fixed(self, name: str, *shape: int) -> Input:
        """A float32 input without dynamic dimensions."""
        return Input(name, self.normal(*shape, dtype=torch.float32), {})

    def tokens(self) -> Input:
        """``x``: tokens (B, T, D)."""
        return Input("x", self.normal(2, self._spec.tokens, self._spec.hidden), {0: "batch"})

    def modulation(self, *names: str) -> tuple[Input, ...]:
        """Vectors (B, D), such as shift, scale and gate."""
        return tuple(
            Input(
                name,
                (0.3 * self.normal(2, self._spec.hidden, dtype=torch.float32)).to(self._dtype),
                {0: "batch"},
            )
            for name in names
        )

    def latents(self) -> Input:
        """``latents`` (N, C, H, W) float32."""
        spec = self._spec
        shape = (2, spec.channels, spec.side, spec.side)
        return Input("latents", self.normal(*shape, dtype=torch.float32), {0: "images"})


STEPS = Input("timesteps", torch.tensor([999.0, 421.0, 0.0]), {0: "steps"})
ROWS = Input("rows", torch.tensor([0, 1, 0, 1]), {0: "batch"})


def empty_module(
    make: Callable[[], Module], dtype: torch.dtype, generator: torch.Generator
) -> Module:
    """A module to trace; the large weights, which are bound later, stay uninitialized and touch no memory.

    The ONNX optimiser drops a bias that happens to be zero and merges small initializers that happen to be equal, so
    biases and small weights get random values.
    """
    with torch.device("meta"):
        module = make()
    module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim not in (2, 4) or parameter.numel() <= SMALL:
            parameter.uniform_(generator=generator)
    return module


def same_names(module: nn.Module, prefix: str = "") -> dict[str, tuple[Slab, ...]]:
    """Every parameter is the checkpoint's tensor of that name behind ``prefix``."""
    return {name: (Slab(prefix + name),) for name, _ in module.named_parameters()}


def block_copies(
    module: nn.Module, depth: int, branch: str
) -> dict[str, dict[str, tuple[Slab, ...]]]:
    """A copy of a branch's unit for every block, with that block's tensors."""
    return {
        f"block_{block:02d}_{branch}": same_names(module, f"blocks.{block}.")
        for block in range(depth)
    }


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors of DiT and PixArt say of the sizes; the names are the same in both.

    Attributes:
        patch, patch_width: of the patch embedding.
        tokens: rows of the position table.
        predicted: values that the final layer gives per token.
        own: shape of one more tensor, which only this family has.
    """

    depth: int
    hidden: int
    mlp_hidden: int
    channels: int
    patch: int
    patch_width: int
    tokens: int
    predicted: int
    own: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Tokens per side, if they are square."""
        return math.isqrt(self.tokens)

    @property
    def ratio(self) -> float:
        """Predicted channels per channel: 1, or 2 with sigma."""
        return self.predicted / (self.patch**2 * self.channels)


def sizes_from_tensors(tensors: Mapping[str, Tensor], what: str, own: str) -> Sizes:
    """Read sizes off tensors, as they are.

    Args:
        tensors: the checkpoint.
        what: the family, for messages.
        own: name of the tensor that only this family has.

    Raises:
        ModelError: a tensor is missing or has another number of dimensions.
    """
    try:
        hidden, channels, patch, patch_width = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        return Sizes(
            depth=1 + max(int(m[1]) for m in map(_BLOCK.match, tensors) if m),
            hidden=hidden,
            mlp_hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
            channels=channels,
            patch=patch,
            patch_width=patch_width,
            tokens=tokens,
            predicted=tensors["final_layer.linear.weight"].shape[0],
            own=tuple(tensors[own].shape),
        )
    except (KeyError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a {what} but its sizes cannot be read: {cause}"
        ) from cause


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Check names and shapes.

    Raises:
        ModelError: listing up to ten missing, unexpected and mis-shaped tensors.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        ("missing", sorted(expected.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{n} {found[n]}, expected {s}"
                for n, s in expected.items()
                if n in found and found[n] != s
            ],
        ),
    ]
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in wrong
        if names
    ]
    if parts:
        raise ModelError(f"tensors do not match {what}: {'; '.join(parts)}")


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors, without its memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
