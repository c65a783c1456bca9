"""Names of cache updates in a graph: op types, and the signatures of graphs of plans.

A predict graph is a chain of updates, one per unit. ``GocCacheUpdate2`` reads two history entries
and stores the prediction; ``GocCacheApply2`` does not store it. The exporters write these names,
and the plugin registers and recognises them. An accumulate graph adds one feature to accumulators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, groupby

from goc_deploy.errors import EngineDirError
from goc_deploy.schedule import MAX_HISTORY

CACHE_DOMAIN = "goc"  # of the ops in ONNX, and the namespace of the plugin in TensorRT
PLUGIN_VERSION = "1"
_OP_TYPE = re.compile(rf"GocCache(Update|Apply)([1-{MAX_HISTORY}])")
_TAPS = re.compile(r"(?:a\*([1-9]))? ?(?:s\*([1-9]))?")
_RUN = re.compile(rf"([1-{MAX_HISTORY}])(w?)\*([1-9][0-9]*)")


def update_name(entries: int, *, stores: bool) -> str:
    """Return the op type of an update that reads ``entries`` history entries."""
    return f"GocCache{'Update' if stores else 'Apply'}{entries}"


def update_from_name(op_type: str) -> tuple[int, bool] | None:
    """Parse an op type, ``GocCacheUpdate2`` to ``(2, True)``; None for any other op."""
    name = _OP_TYPE.fullmatch(op_type)
    return (int(name[2]), name[1] == "Update") if name else None


def predict_signature(updates: Iterable[tuple[int, bool]]) -> str:
    """Write updates as runs: ``[(2, True)] * 8 + [(1, False)]`` is ``2w*8 1*1``.

    Args:
        updates: per unit, the number of history entries it reads and whether it stores the
            prediction.
    """
    words = (f"{entries}{'w' if stores else ''}" for entries, stores in updates)
    return " ".join(f"{word}*{len(list(run))}" for word, run in groupby(words))


def updates_from_signature(signature: str) -> list[tuple[int, bool]]:
    """Parse a predict signature, the inverse of `predict_signature`.

    Raises:
        EngineDirError: the text is not a signature.
    """
    runs = [_RUN.fullmatch(word) for word in signature.split(" ")]
    if not all(runs):
        raise EngineDirError(
            f"{signature!r} is not a predict signature; each run must read 1 to {MAX_HISTORY} "
            "entries, as in '2w*8 1*3'"
        )
    return list(chain.from_iterable([(int(m[1]), bool(m[2]))] * int(m[3]) for m in runs if m))


def accumulate_signature(starts: Sequence[bool]) -> str:
    """Write taps as runs: two that are added and one that starts are ``a*2 s*1``.

    Args:
        starts: per tap, whether it starts its accumulator; those that do come last.
    """
    return " ".join(f"{'s' if mark else 'a'}*{len(list(run))}" for mark, run in groupby(starts))


def taps_from_signature(signature: str) -> list[bool] | None:
    """Parse an accumulate signature, the inverse of `accumulate_signature`.

    Returns:
        Per tap, whether it starts its accumulator; None for another kind of signature.
    """
    match = _TAPS.fullmatch(signature)
    taps = [False] * int(match[1] or 0) + [True] * int(match[2] or 0) if match else []
    return taps if taps and accumulate_signature(taps) == signature else None
