"""Where a request spends its time: spans that the runtime records, totals, and a Chrome trace."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

_BLOCK = re.compile(r"^block_\d+_")


@dataclass(frozen=True, slots=True)
class Span:
    """A named interval of time.

    Attributes:
        category: ``wait`` (for a free session), ``prepare`` (inputs), ``step``, or ``launch``
            (within a step).
        name: what ran.
        start_ns: time of `time.perf_counter_ns` at the start.
        stop_ns: the same at the end.
    """

    category: str
    name: str
    start_ns: int
    stop_ns: int

    @property
    def ms(self) -> float:
        """Duration in milliseconds."""
        return (self.stop_ns - self.start_ns) / 1e6


@contextmanager
def recorded(spans: list[Span] | None, category: str, name: str) -> Iterator[None]:
    """Record the body as one span; if ``spans`` is None, record nothing."""
    started = perf_counter_ns()
    yield
    if spans is not None:
        spans.append(Span(category, name, started, perf_counter_ns()))


def totals_ms(spans: Iterable[Span]) -> dict[str, float]:
    """Sum up milliseconds by kind of launch, ``prepare``, ``wait``, and ``between launches``.

    ``block_07_attn`` counts as ``attn``, and ``predict 3-3, 1 ahead`` as ``predict ahead``.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        if span.category == "launch":
            totals[_kind_of_launch(span.name)] += span.ms
            totals["between launches"] -= span.ms
        else:
            totals["between launches" if span.category == "step" else span.category] += span.ms
    return dict(totals)


def _kind_of_launch(name: str) -> str:
    if not name.startswith("predict"):
        return _BLOCK.sub("", name)
    return "predict ahead" if name.endswith("ahead") else "predict"


def chrome_trace(spans_of_process: Mapping[str, Sequence[Span]]) -> dict[str, Any]:
    """Convert spans to the Trace Event Format, with one process per entry.

    A step contains its launches because their times are within its time.

    chrome://tracing and ui.perfetto.dev open the result. Source: "Trace Event Format", complete
    events (``ph: "X"``, times in microseconds).
    """
    events: list[dict[str, Any]] = []
    for pid, (process, spans) in enumerate(spans_of_process.items()):
        events.append(
            {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}}
        )
        origin = min((span.start_ns for span in spans), default=0)
        events += [
            {
                "ph": "X",
                "cat": span.category,
                "name": span.name,
                "pid": pid,
                "tid": 0,
                "ts": (span.start_ns - origin) / 1e3,
                "dur": (span.stop_ns - span.start_ns) / 1e3,
            }
            for span in sorted(spans, key=lambda span: (span.start_ns, -span.stop_ns))
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}
