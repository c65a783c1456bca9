"""The layers of a Stable Diffusion 3 in a file of its authors, and its position table."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.authors import AuthorsLayout
from goc_deploy.size_inputs import places_in_table, sines
from goc_deploy.spec import Positions

TABLE = "pos_embed.pos_embed"
ROUNDED = 2**-7  # of sines and cosines that were rounded to bfloat16
SHOWN = 1e-3  # positions that differ by less look alike in a table in half precision
FRACTION = 64  # positions of this denominator are preferred to others that look alike
TURNS = range(-32, 33)  # that the position of the first token of a table may be away from zero
_OUTER = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_OF_STREAM = {
    "x_block": {
        "adaLN_modulation.1": ("norm1.linear",),
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.proj": ("attn.to_out.0",),
        "attn.ln_q": ("attn.norm_q",),
        "attn.ln_k": ("attn.norm_k",),
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2.proj": ("attn2.to_out.0",),
        "attn2.ln_q": ("attn2.norm_q",),
        "attn2.ln_k": ("attn2.norm_k",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
    },
    "context_block": {
        "adaLN_modulation.1": ("norm1_context.linear",),
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.proj": ("attn.to_add_out",),
        "attn.ln_q": ("attn.norm_added_q",),
        "attn.ln_k": ("attn.norm_added_k",),
        "mlp.fc1": ("ff_context.net.0.proj",),
        "mlp.fc2": ("ff_context.net.2",),
    },
}


LAYOUT = AuthorsLayout(
    outer=_OUTER,
    blocks={
        f"joint_blocks.{{}}.{stream}.": ("transformer_blocks.{}.", layers)
        for stream, layers in _OF_STREAM.items()
    },
    joined="joint_blocks.0.context_block.attn.qkv.weight",
    swapped=("norm_out.linear", "transformer_blocks.{}.norm1_context.linear"),
)


def state_from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an authors' single file under the names of diffusers."""
    rest = dict(tensors)
    table = rest.pop("pos_embed")
    return {**LAYOUT.state(rest), TABLE: table}


def positions_from_table(table: Tensor) -> Positions:
    """The positions from which a table of sines and cosines was made.

    Public models do not document the distance and the origin of theirs, so both are measured: the
    fastest sines and cosines are the position itself, up to whole turns.

    Args:
        table: (1, side * side, D) in any float dtype.

    Raises:
        ModelError: the table is not square, or not made of sines of even distances.
    """
    side = math.isqrt(table.shape[1])
    if table.shape[1] != side**2 or side < 2 or table.shape[2] % 4:
        raise ModelError(
            f"{TABLE} is {tuple(table.shape)}, expected (1, side * side, width) with a width that "
            "4 divides"
        )
    width = table.shape[2] // 2
    grid = table.reshape(side, side, 2 * width)
    columns = grid[0, :, :width].double().numpy()
    angles = np.unwrap(np.arctan2(columns[:, 0], columns[:, width // 2]))
    distance, first = np.polyfit(np.arange(side), angles, 1)
    origins = first + 2 * np.pi * np.array(TURNS)
    origin = origins[np.abs(sines(origins, width) - columns[0]).sum(axis=1).argmin()]
    if distance > 0:
        stretch, start = float(1 / distance), float(origin)
        measured = Positions("sine", stretch=round(stretch, 6), table=side, origin=round(start, 6))
        simple = Positions("sine", stretch=_fraction(stretch), table=side, origin=_fraction(start))
        for positions in (simple, measured) if _are_close(simple, measured) else (measured,):
            if _is_made_of(grid, positions):
                return positions
    raise ModelError(
        f"the position table {TABLE} was learned: it has no sines of even distances; such a model "
        "is not supported"
    )


def _fraction(value: float) -> float:
    return round(value * FRACTION) / FRACTION


def _are_close(one: Positions, other: Positions) -> bool:
    """Whether positions differ by less than a table in half precision can show."""
    if not one.stretch:
        return False
    places = [places_in_table(positions.table, positions) for positions in (one, other)]
    return bool(np.abs(places[0] - places[1]).max() < SHOWN)


def _is_made_of(grid: Tensor, positions: Positions) -> bool:
    """Whether a table (side, side, D) shows these positions; it is compared row by row."""
    side, _, hidden = grid.shape
    axis = torch.from_numpy(sines(places_in_table(side, positions), hidden // 2)).float()
    return all(
        bool((row.float() - torch.cat([axis, own.expand_as(axis)], dim=1)).abs().max() < ROUNDED)
        for row, own in zip(grid, axis, strict=True)
    )
