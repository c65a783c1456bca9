"""The names of Wan's tensors in the files of its authors, as those of diffusers.

Source: the authors' ``wan/modules/model.py``; diffusers' ``loaders/single_file_utils.py`` maps the
same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from goc_deploy.exporters.architectures.contract import OtherLayout
from goc_deploy.spec import ModelSpec

_BLOCK = re.compile(r"blocks\.[0-9]+\.")
# How a name begins -> the same in diffusers.
_AROUND = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
}
_IN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",  # the only norm of a block with weights
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{
        f"{theirs}.{part}.": f"{ours}.{layer}."
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, layer in (
            *((part, f"to_{part}") for part in "qkv"),
            ("o", "to_out.0"),
            *((f"norm_{part}", f"norm_{part}") for part in "qk"),
        )
    },
}


def state_from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of the authors under the names of diffusers.

    A name that is in no table, such as those of models that start from a picture, stays.
    """
    return {_name_in_diffusers(name): tensor for name, tensor in tensors.items()}


def _name_in_diffusers(name: str) -> str:
    block = _BLOCK.match(name)
    outer, names = (block[0], _IN_BLOCK) if block else ("", _AROUND)
    rest = name.removeprefix(outer)
    for theirs, ours in names.items():
        if rest.startswith(theirs):
            return f"{outer}{ours}{rest.removeprefix(theirs)}"
    return name


def layers_of_authors(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Every layer of a model under its name in diffusers -> its name in the authors' files."""
    names = _layers_of_table(_AROUND)
    for i in range(spec.depth):
        in_block = _layers_of_table(_IN_BLOCK)
        names |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in in_block.items()}
    return {ours: (theirs,) for ours, theirs in names.items()}


def _layers_of_table(names: Mapping[str, str]) -> dict[str, str]:
    """The layers of a table, by their names in diffusers; tables of modulation are none."""
    return {
        ours.removesuffix("."): theirs.removesuffix(".")
        for theirs, ours in names.items()
        if theirs.endswith(".")
    }


AUTHORS = OtherLayout(
    frozenset({"head.modulation", "blocks.0.self_attn.q.weight"}), state_from_authors
)
