"""The compiler passes that order evaluations, join them to launches and assign their memory.

`goc_deploy.compiler.forms` lists which of them make which form of a plan.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice, takewhile

from goc_deploy.blocks import ALL_STREAMS, TokenStream
from goc_deploy.compiler.plan import (
    MAX_LAUNCH_UNITS,
    Collect,
    Compute,
    Launch,
    Predict,
    Prediction,
    Segment,
)
from goc_deploy.compiler.values import Evaluation

LAUNCHES_BEFORE_AHEAD = 3  # each additional launch is a little faster and needs one more slot


def store_alike(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Make all full steps store the same features, so that one engine serves them.

    Before: step 4 stores features 0 and 1, step 8 stores nothing. After: step 8 stores features 0
    and 1 too, although no step reads them.
    """
    predicting = {e.step for e in evaluations if e.reads}
    stored = {e.feature for e in evaluations if e.step not in predicting and e.value is not None}
    new = itertools.count(1 + max((e.value for e in evaluations if e.value is not None), default=0))
    return [
        replace(e, value=next(new))
        if e.step not in predicting and e.value is None and e.feature in stored
        else e
        for e in evaluations
    ]


def accumulate_ahead(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Move the predictions of collapsed steps into the last step that computes a unit.

    These predictions depend on the history alone. If they are made soon after their unit ran, a
    feature that only they read occupies a slot for a short time. A few units are predicted at a
    time, because a launch is faster if its temporary tensors fit into the CPU's cache (DiT-XL/2,
    gradient of all units: 38 ms with one unit per launch, 33 ms with four).

    Before: step 4 computes units 0 and 1, step 5 predicts 0 and 1. After: step 4 computes 0 and 1
    and predicts both ahead. The order of the evaluations of each feature does not change. A step
    that predicts features of other streams, because a later prediction reads them, stays as it is.
    """
    moved: list[Evaluation] = []
    steps = [list(step) for _, step in groupby(evaluations, key=lambda e: e.step)]
    while steps:
        step, *steps = steps
        collapsed = [{e.feature: e for e in later} for later in takewhile(_is_collapsed, steps)]
        steps = steps[len(collapsed) :]
        groups = iter(group_launches(step))
        while some := list(islice(groups, LAUNCHES_BEFORE_AHEAD)):
            ran = [e for group in some for e in group]
            moved += ran
            moved += [
                replace(later[e.feature], ahead=ahead)
                for ahead, later in enumerate(collapsed, 1)
                for e in ran
                if e.feature in later
            ]
    return moved


def _is_collapsed(step: list[Evaluation]) -> bool:
    """Whether a step computes no unit and changes the image only."""
    return all(e.reads and e.stream == "image" for e in step)


def group_launches(evaluations: list[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations into launches of at most `MAX_LAUNCH_UNITS` predictions.

    Predictions of adjacent features of a stream for one step share a launch. Every computed unit is
    a launch of its own, with all its features.

    Before: step 4 predicts units 0 and 1 and computes unit 2. After: step 4 launches the features
    of the image of units 0 and 1 together, then those of other streams, then unit 2.
    """

    def launch(e: Evaluation) -> tuple[int, int | None]:
        return e.step, None if e.reads else e.unit

    groups: list[list[Evaluation]] = []
    for _, run in groupby(evaluations, key=launch):
        by_stream = sorted(run, key=lambda e: ALL_STREAMS.index(e.stream))
        if not by_stream[0].reads:
            groups.append(by_stream)
            continue
        group: list[Evaluation] = []
        for e in by_stream:
            before = (e.stream, e.feature - 1)
            follows = group and (group[-1].stream, group[-1].feature) == before
            if not follows or len(group) == MAX_LAUNCH_UNITS:
                group = []
                groups.append(group)
            group.append(e)
    return groups


def merge_full_steps(groups: list[list[Evaluation]]) -> list[list[Evaluation]]:
    """Merge the launches of each full step into one.

    Before: step 4 launches units 0, 1, 2 and 3. After: step 4 is one launch of units 0 to 3.
    """
    steps = [list(step) for _, step in groupby(groups, key=lambda group: group[0].step)]
    merged: list[list[Evaluation]] = []
    for step in steps:
        units = [e for group in step for e in group]
        merged += step if any(e.reads for e in units) else [units]
    return merged


def assign_slots(
    groups: list[list[Evaluation]],
) -> tuple[tuple[tuple[Launch, ...], ...], Counter[TokenStream]]:
    """Assign a slot of its stream to every stored value, for as long as the value is needed.

    A prediction overwrites the oldest entry of its own feature that is read for the last time in
    the same launch. Any other value prefers a slot that its feature used before. As a result, steps
    of one kind use the same slots, and their launches are the same. All other slots whose values
    are read for the last time in a launch are free from the next launch on, because the order of
    writes within a launch is not fixed. The same holds for values that are never read.

    Returns:
        (launches by the step in which they run, number of slots of each stream).
    """
    last_read = {
        value: index for index, group in enumerate(groups) for e in group for value in e.reads
    }
    slot_of: dict[int, int] = {}
    stream_of = {e.value: e.stream for group in groups for e in group if e.value is not None}
    free: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
    owner: dict[tuple[TokenStream, int], int] = {}  # slot -> the feature that used it last
    slots: Counter[TokenStream] = Counter()
    steps: dict[int, list[Launch]] = {}
    for index, group in enumerate(groups):
        dying = {value for e in group for value in e.reads if last_read[value] == index}
        entries: list[Prediction] = []
        for e in group:
            read_slots = tuple(slot_of[value] for value in e.reads)
            store, of_stream = None, free[e.stream]
            if e.value is not None:
                own = [value for value in e.reads if value in dying]
                if own:
                    oldest = min(own)  # values are numbered in the order of evaluation
                    store = slot_of[oldest]
                    dying.remove(oldest)
                elif of_stream:
                    kept = [slot for slot in of_stream if owner[e.stream, slot] == e.feature]
                    store = kept[-1] if kept else of_stream[-1]
                    of_stream.remove(store)
                else:
                    store = slots[e.stream]
                    slots[e.stream] += 1
                slot_of[e.value], owner[e.stream, store] = store, e.feature
                if e.value not in last_read:
                    dying.add(e.value)
            entries.append(Prediction(read_slots, e.coefficients, store))
        for value in sorted(dying, key=slot_of.__getitem__, reverse=True):
            free[stream_of[value]].append(slot_of[value])
        first = group[0]
        steps.setdefault(first.step - first.ahead, []).append(_launch(group, entries))
        if first.ahead:
            steps.setdefault(first.step, [Collect(first.ahead)])
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots


def _launch(group: list[Evaluation], entries: list[Prediction]) -> Launch:
    """Make the launch of a group of evaluations."""
    first = group[0]
    if first.reads:
        return Predict(first.feature, tuple(entries), first.ahead, first.stream)
    stores = tuple(entry.store for entry in entries)
    one = all(e.unit == first.unit for e in group)
    return Compute(first.unit, stores) if one else Segment(stores)
