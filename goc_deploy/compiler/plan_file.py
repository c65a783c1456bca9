"""Plans as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler.plan import (
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Residual,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.options import SEGMENTS
from goc_deploy.samplers import SamplerTable
from goc_deploy.samplers.head import MAX_KEPT, Head, HeadFeatures, HeadForm
from goc_deploy.schedule import Schedule
from goc_deploy.spec import Count
from goc_deploy.strict_json import check_format, convert, dump_json, expected, parse_json

PLAN_FORMAT, PLAN_VERSION = "goc_deploy.plan", 4


class _Row(Struct, array_like=True, forbid_unknown_fields=True):
    """A list in the file, whose items are the fields in their order."""


class _Compute(_Row, tag="c"):
    unit: Count
    store: Count | tuple[Count | None, ...] | None


class _Collect(_Row, tag="a"):
    ahead: Count


class _Residual(_Row, tag="r"):
    store: Count


class _Prediction(_Row):
    slots: tuple[Count, ...]
    coefficients: tuple[float, ...]
    store: Count | None


class _Predict(_Row, tag="p"):
    feature: Count
    predictions: tuple[_Prediction, ...]
    ahead: Count
    stream: TokenStream = "image"


_LaunchRow = _Compute | _Collect | _Residual | _Predict


class _PlanFile(Struct):
    """The fields of a plan file after ``format`` and ``version``."""

    name: str
    slots: Count
    sampler: SamplerTable
    launches: tuple[tuple[_LaunchRow, ...], ...]
    segments: str = "none"
    text_slots: Count = 0
    reference_slots: Count = 0


class _Head(Struct, forbid_unknown_fields=True):
    """The form of a head; its weights are in a file of their own."""

    features: HeadFeatures
    outputs: Annotated[int, Meta(ge=0, le=MAX_KEPT)]
    tokens: Annotated[int, Meta(ge=0, le=MAX_KEPT)]
    scaled: bool
    cfg_scales: tuple[float, float]


class _Sampler(Struct):
    head: _Head | None = None


class _FileWithHead(Struct):
    sampler: _Sampler


def plan_to_json(plan: Plan) -> str:
    """Write a plan as JSON, without the weights of its head.

    Launches are lists: ``["c", unit, slot]`` computes, with a list of slots if the unit has several
    features, ``["p", feature, [[slots, coefficients, slot], ...], ahead]`` predicts, ``["a",
    ahead]`` adds an accumulator, and ``["r", slot]`` keeps the residual. A prediction of a stream
    other than the image ends with its name.
    """
    others = {"text_slots": plan.text_slots, "reference_slots": plan.reference_slots}
    return dump_json(
        {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "name": plan.name,
            "segments": plan.segments,
            "slots": plan.slots,
            **{name: slots for name, slots in others.items() if slots},
            "sampler": _sampler_to_fields(plan.sampler),
            "launches": [[_launch_to_list(op) for op in step] for step in plan.launches],
        },
        indent=None,
    )


def _sampler_to_fields(table: SamplerTable) -> dict[str, Any]:
    fields = asdict(replace(table, head=None))
    head = table.head
    fields["head"] = head and {**asdict(head.form), "cfg_scales": head.cfg_scales}
    if table.start == 1:  # files that older versions wrote have no start
        del fields["start"]
    if table.size_shift is None:
        del fields["size_shift"]
    return fields


def _launch_to_list(op: Launch) -> list[Any]:
    if isinstance(op, Compute):
        return ["c", op.unit, op.stores[0] if len(op.stores) == 1 else list(op.stores)]
    if isinstance(op, Collect):
        return ["a", op.ahead]
    if isinstance(op, Residual):
        return ["r", op.store]
    assert isinstance(op, Predict), "a plan is written in the host's form"
    return [
        "p",
        op.feature,
        [[list(p.slots), list(p.coefficients), p.store] for p in op.predictions],
        op.ahead,
        *([op.stream] if op.stream != "image" else []),
    ]


def plan_from_json(
    text: bytes, schedule: Schedule, where: str, weights: np.ndarray | None = None
) -> Plan:
    """Read a plan.

    Args:
        text: the file.
        schedule: the schedule that the plan was compiled from.
        where: name of the file for messages.
        weights: weights of its head, (T, F, P) float32, or None if the manifest lists none.

    Raises:
        EngineDirError: the text is not JSON or has another format, or a field is missing or wrong;
            the message has the field's path. `check_plan` checks whether the plan is safe to run.
    """
    fields = parse_json(text, where, EngineDirError)
    check_format(fields, PLAN_FORMAT, PLAN_VERSION, where, EngineDirError)
    head = _head_from_fields(fields, weights, where)
    file: _PlanFile = convert(fields, _PlanFile, where, EngineDirError)
    if file.segments not in SEGMENTS:
        raise EngineDirError(f"{where}: $.segments: {expected(SEGMENTS, file.segments)}")
    launches = tuple(tuple(map(_launch_from_row, step)) for step in file.launches)
    table = replace(file.sampler, head=head)
    return Plan(
        file.name,
        table,
        launches,
        file.slots,
        schedule,
        file.segments,
        text_slots=file.text_slots,
        reference_slots=file.reference_slots,
    )


def _head_from_fields(
    fields: dict[str, Any], weights: np.ndarray | None, where: str
) -> Head | None:
    """Take the head out of the fields of the sampler, and give it its weights."""
    file: _FileWithHead = convert(fields, _FileWithHead, where, EngineDirError)
    fields["sampler"].pop("head", None)
    of_head, path = file.sampler.head, f"{where}: $.sampler.head"
    if of_head is None and weights is not None:
        raise EngineDirError(f"{path}: the manifest lists weights of a head, but there is none")
    if of_head is None:
        return None
    if weights is None:
        raise EngineDirError(f"{path}: the manifest lists no weights of this head")
    form = HeadForm(of_head.features, of_head.outputs, of_head.tokens, of_head.scaled)
    if form.tokens and not form.reads_tokens:
        raise EngineDirError(
            f"{path}.tokens: expected 0 for {of_head.features}, got {of_head.tokens}"
        )
    if not 0 <= of_head.cfg_scales[0] <= of_head.cfg_scales[1]:
        raise EngineDirError(f"{path}.cfg_scales: expected a range, got {list(of_head.cfg_scales)}")
    _, *size = weights.shape
    shape = (len(weights), size[0], size[1])
    return Head(form, of_head.cfg_scales, shape, weights.astype("<f4").tobytes())


def _launch_from_row(row: _LaunchRow) -> Launch:
    if isinstance(row, _Compute):
        stores = row.store if isinstance(row.store, tuple) else (row.store,)
        return Compute(row.unit, stores)
    if isinstance(row, _Collect):
        return Collect(row.ahead)
    if isinstance(row, _Residual):
        return Residual(row.store)
    predictions = (Prediction(p.slots, p.coefficients, p.store) for p in row.predictions)
    return Predict(row.feature, tuple(predictions), row.ahead, row.stream)
