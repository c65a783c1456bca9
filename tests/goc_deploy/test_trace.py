from __future__ import annotations

import pytest

from goc_deploy.trace import Span, chrome_trace, recorded, totals_ms

SPANS = [
    Span("wait", "wait for a session", 0, 1_000_000),
    Span("step", "step 0 (full)", 2_000_000, 9_000_000),
    Span("launch", "block_00_attn", 2_000_000, 5_000_000),
    Span("launch", "block_11_attn", 5_000_000, 7_000_000),
    Span("launch", "predict 3-3, 1 ahead", 7_000_000, 8_500_000),
]


def test_totals_add_up_to_the_whole_and_name_what_no_launch_took() -> None:
    totals = totals_ms(SPANS)
    assert totals == pytest.approx(
        {"wait": 1, "attn": 5, "predict ahead": 1.5, "between launches": 0.5}
    )
    assert sum(totals.values()) == pytest.approx(1 + 7)


def test_a_trace_has_a_process_per_plan_and_puts_a_step_before_its_launches() -> None:
    events = chrome_trace({"none": SPANS[2:], "fora": SPANS})["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["none", "fora"]
    second = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [e["name"] for e in second] == [span.name for span in SPANS]
    assert (second[1]["ts"], second[1]["dur"]) == (2000, 7000)
    assert [e["ts"] for e in events if e["pid"] == 0 and e["ph"] == "X"] == [0, 3000, 5000]


def test_nothing_is_recorded_where_nobody_asked() -> None:
    spans: list[Span] = []
    with recorded(None, "step", "a"), recorded(spans, "step", "b"):
        pass
    assert [span.name for span in spans] == ["b"]
    assert spans[0].ms >= 0
