"""The later steps that a plan predicts for, whose modulation must be at hand before they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from goc_deploy.compiler import Plan


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Where the gates of later steps are, and which step fetches them.

    Attributes:
        place: later step -> number of the buffer that has its gates, from the step that fetches
            them until the last step that predicts for it.
        fetched: per step, the later steps whose gates it fetches, because it is the first that
            predicts for them.
        places: number of buffers for gates.
    """

    place: Mapping[int, int] = field(default_factory=dict)
    fetched: Sequence[Sequence[int]] = ()
    places: int = 0


def lookahead_of(plan: Plan) -> Lookahead:
    """Assign a buffer to the gates of each later step, for as long as they are read."""
    targets = [plan.targets(step) for step in range(plan.steps)]
    last = {target: step for step, later in enumerate(targets) for target in later}
    place: dict[int, int] = {}
    fetched: list[list[int]] = []
    free: list[int] = []
    places = 0
    for step, later in enumerate(targets):
        fetched.append([target for target in later if target not in place])
        for target in fetched[-1]:
            if not free:
                free, places = [places], places + 1
            place[target] = free.pop()
        free += sorted((place[target] for target in later if last[target] == step), reverse=True)
    return Lookahead(place, fetched, places)


def chunk_steps(plan: Plan, lookahead: Lookahead, first: int, chunk: int) -> list[int]:
    """The steps whose modulation a table of a chunk has, in its order.

    These are the steps of the chunk, and then the later steps whose gates are fetched in it.

    Args:
        plan: the plan.
        lookahead: the later steps of the plan.
        first: the first step of the chunk.
        chunk: number of steps of a chunk.
    """
    own = range(first, min(first + chunk, plan.steps))
    later = {target for step in own for target in lookahead.fetched[step]}
    return [*own, *sorted(later - set(own))]


def table_steps(plan: Plan, lookahead: Lookahead, chunk: int) -> int:
    """The largest number of steps in a table, for chunks of a size."""
    return max(
        len(chunk_steps(plan, lookahead, first, chunk)) for first in range(0, plan.steps, chunk)
    )
