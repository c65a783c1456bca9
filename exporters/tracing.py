"""Parts of every traced module: example inputs, empty weights, bindings by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.units import Input, Slab
from goc_deploy.spec import ModelSpec

SEED = 0  # seed of the example inputs
SOME_TOKENS = 24  # of example inputs, if their number is dynamic
SMALL = 4096  # elements; the ONNX optimizer merges equal initializers of up to 1024

Module = TypeVar("Module", bound=nn.Module)


class Examples:
    """Example inputs of the graphs, from one seed.

    Args:
        spec: sizes of the model.
        dtype: dtype of tokens and modulation.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec, self._dtype = spec, dtype
        self.generator = torch.Generator().manual_seed(SEED)

    def module(self, make: Callable[[ModelSpec], Module]) -> Module:
        """A module of the model to trace; see `empty_module`."""
        return empty_module(lambda: make(self._spec), self._dtype, self.generator)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of standard normal values; by default in the dtype of the tokens."""
        return torch.randn(shape, generator=self.generator).to(dtype or self._dtype)

    def fixed(self, name: str, *shape: int) -> Input:
        """A float32 input without dynamic dimensions."""
        return Input(name, self.normal(*shape, dtype=torch.float32), {})

    def tokens(self) -> Input:
        """``x``: tokens (B, T, D)."""
        tokens, dynamic = self._spec.tokens, {0: "batch"}
        if self._spec.any_size:
            tokens, dynamic = SOME_TOKENS, {0: "batch", 1: "tokens"}
        return Input("x", self.normal(2, tokens, self._spec.hidden), dynamic)

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
        latents = self.normal(2, *self._spec.latents, dtype=torch.float32)
        return Input("latents", latents, {0: "images"})


KINDS = ("weight", "bias")  # the tensors of a linear layer
STEPS = Input("timesteps", torch.tensor([999.0, 421.0, 0.0]), {0: "steps"})
ROWS = Input("rows", torch.tensor([0, 1, 0, 1]), {0: "batch"})


def empty_module(
    make: Callable[[], Module], dtype: torch.dtype, generator: torch.Generator
) -> Module:
    """Make a module to trace; its large weights stay uninitialized and occupy no memory.

    The large weights are bound later. The ONNX optimizer drops a bias that happens to be zero and
    merges small initializers that happen to be equal, so biases and small weights get random
    values.
    """
    with torch.device("meta"):
        module = make()
    module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim not in (2, 4) or parameter.numel() <= SMALL:
            parameter.uniform_(generator=generator)
    return module


def same_names(module: nn.Module, prefix: str = "") -> dict[str, tuple[Slab, ...]]:
    """Bind every parameter to the checkpoint's tensor of the same name after ``prefix``."""
    return {name: (Slab(prefix + name),) for name, _ in module.named_parameters()}


def layers_of(
    names: Mapping[str, str | tuple[str, ...]], kinds: tuple[str, ...] = KINDS
) -> dict[str, tuple[Slab, ...]]:
    """Bind linear layers: name in the module -> the layers of the checkpoint that it joins."""
    return {
        f"{ours}.{kind}": tuple(
            Slab(f"{layer}.{kind}") for layer in ((theirs,) if isinstance(theirs, str) else theirs)
        )
        for ours, theirs in names.items()
        for kind in kinds
    }


def block_copies(
    module: nn.Module, depth: int, branch: str
) -> dict[str, dict[str, tuple[Slab, ...]]]:
    """Bindings of a branch's unit in every block, to the tensors of that block."""
    return {
        f"block_{block:02d}_{branch}": same_names(module, f"blocks.{block}.")
        for block in range(depth)
    }


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        ("missing", sorted(expected.keys() - actual.keys())),
        ("unexpected", sorted(actual.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{n} {actual[n]}, expected {s}"
                for n, s in expected.items()
                if n in actual and actual[n] != s
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
    """Names and shapes of a module's tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
