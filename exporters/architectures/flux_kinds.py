"""What the graphs of FLUX.1 and FLUX.2 have in common: examples, bindings and units of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures.flux_diffusers import VALUES_OF_PATCH, block_names
from goc_deploy.exporters.tracing import KINDS, SOME_TOKENS, Examples, layers_of
from goc_deploy.exporters.units import Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions

OUTPUTS = ("x_out", "text_out", "feature", "feature_text")
BOTH = ("shift", "scale", "gate", "shift_text", "scale_text", "gate_text")
ONE = ("shift", "scale", "gate", "gate_text")
ROWS_OF_KINDS = {"attn": BOTH, "mlp": BOTH, "single": ONE, "last": ONE[:-1]}
# Where a row is in the modulation layer of its block and stream:
CHUNKS = {
    "attn": {"shift": 0, "scale": 1, "gate": 2},
    "mlp": {"shift": 3, "scale": 4, "gate": 5},
    "single": {"shift": 0, "scale": 1, "gate": 2},
}


def block_kinds(
    spec: ModelSpec,
    examples: Examples,
    traceable: Callable[[Callable[[ModelSpec], torch.nn.Module]], torch.nn.Module],
    units: Mapping[str, Callable[[ModelSpec], torch.nn.Module]],
    bindings: Mapping[str, Callable[[str], Binding]],
) -> tuple[GraphKind, ...]:
    """The units of double blocks, of single blocks, and of the last one, if there are any.

    Args:
        spec: sizes of the model.
        examples: makes the example inputs.
        traceable: makes a module to trace.
        units: makes the module of each kind of unit, one of those in `ROWS_OF_KINDS`.
        bindings: binds the unit of each branch to the tensors of a block.
    """
    of_text = Input("text", examples.normal(2, spec.caption_tokens, spec.hidden), {0: "batch"})
    tokens, angles = (examples.tokens(), of_text), _angles(spec)
    last = spec.depth - 1
    copies: dict[str, dict[str, Binding]] = {kind: {} for kind in units}
    for i, (block, branches) in enumerate(
        zip(block_names(spec), spec.branches_of_blocks, strict=True)
    ):
        for branch in branches:
            bound = bindings[branch](block)
            copies["last" if i == last else branch][f"block_{i:02d}_{branch}"] = bound
    return tuple(
        GraphKind(
            kind,
            traceable(units[kind]),
            (*tokens, *examples.modulation(*rows), *(() if kind == "mlp" else angles)),
            OUTPUTS if kind != "last" else ("x_out", "feature"),
            copies[kind],
        )
        for kind, rows in ROWS_OF_KINDS.items()
        if copies[kind]
    )


def caption_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """``captions`` and ``caption_rows``."""
    shape = (2, spec.caption_tokens, spec.caption_channels)
    return (
        Input("captions", examples.normal(*shape, dtype=torch.float32), {0: "captions"}),
        Input("caption_rows", torch.tensor([1, 0, 1]), {0: "batch"}),
    )


def _angles(spec: ModelSpec) -> tuple[Input, ...]:
    """``cos`` and ``sin`` of the example tokens, and of those of the text if they are turned."""
    speeds = torch.linspace(1, 0.1, spec.hidden // spec.heads // 2)
    angles, of_text = (
        torch.linspace(0, 3, count)[:, None] * speeds
        for count in (SOME_TOKENS, spec.caption_tokens)
    )
    inputs = (
        Input("cos", angles.cos(), {0: "tokens"}),
        Input("sin", angles.sin(), {0: "tokens"}),
    )
    if not positions(spec).turns_text:
        return inputs
    return (*inputs, Input("text_cos", of_text.cos(), {}), Input("text_sin", of_text.sin(), {}))


def norms_of(attn: str, ours: str = "", theirs: str = "") -> dict[str, tuple[Slab, ...]]:
    """Bind the norms of queries and keys of an attention."""
    return {f"{ours}norm_{part}": (Slab(f"{attn}.norm_{theirs}{part}.weight"),) for part in "qk"}


def attn_of(block: str, kinds: tuple[str, ...] = KINDS) -> Binding:
    """Bind the attention of a double block."""
    attn = f"{block}.attn"
    layers: dict[str, str | tuple[str, ...]] = {
        "image.qkv": tuple(f"{attn}.to_{part}" for part in "qkv"),
        "text.qkv": tuple(f"{attn}.add_{part}_proj" for part in "qkv"),
        "image.proj": f"{attn}.to_out.0",
        "text.proj": f"{attn}.to_add_out",
    }
    norms = {**norms_of(attn, "image."), **norms_of(attn, "text.", "added_")}
    return {**layers_of(layers, kinds), **norms}


def refuse_fp16(precision: Precision, family: str) -> None:
    """Refuse a precision that the text tokens of a family exceed.

    Raises:
        UsageError: the precision is fp16.
    """
    if precision == "fp16":
        raise UsageError(
            f"`precision=fp16`: the text tokens of a {family} exceed the range of fp16; use bf16 "
            "or fp32"
        )


def final_of(spec: ModelSpec, kinds: tuple[str, ...] = KINDS) -> Binding:
    """Bind the final layer, whose rows are (C, p, p); those of `any_size.FinalUnit` (p, p, C)."""
    rows = [
        channel * VALUES_OF_PATCH + pixel
        for pixel in range(VALUES_OF_PATCH)
        for channel in range(spec.channels)
    ]
    return {
        f"linear.{kind}": tuple(Slab(f"proj_out.{kind}", row, row + 1) for row in rows)
        for kind in kinds
    }


def positions(spec: ModelSpec) -> Positions:
    """The positions of the spec, which has them for every size."""
    assert spec.positions is not None
    return spec.positions
