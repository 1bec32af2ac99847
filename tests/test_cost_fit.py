"""Costs fitted to events: made-up runs with known costs come back, and what does not vary is not invented."""

from __future__ import annotations

import numpy as np
import pytest

from moepic_core.cost_fit import Run, fit_costs
from moepic_core.costs import LinkSpeed
from moepic_core.trace import EVENT, EventKind, Part, TracePhase

BEFORE, STEP, GUESS, SEGMENT, ROW, AFTER = 1e-3, 2e-4, 5e-5, 3e-5, 1e-6, 4e-3
NEURONS = 100
LINK = LinkSpeed(bytes_per_s=1e9, latency_s=1e-5, copy_s_per_byte=1e-10)


def run(top_rows: int, guessing: bool, layers: int = 3, tokens: int = 6, stall: float = 0.0, moved: int = 0) -> Run:
    """Tokens of which every second one uses two experts as top and bottom, the others two whole ones."""
    rows, now = [], 10.0

    def put(kind: EventKind, layer: int, part: int, start: float, end: float, nbytes: int, token: int) -> None:
        rows.append((kind, TracePhase.DECODE, part, layer, -1, 1, token, nbytes, start, end))

    put(EventKind.TOKEN, -1, 0, now - 1, now, 0, -1)
    for token in range(tokens):
        began = now
        for layer in range(layers):
            now += BEFORE * (1 + layer)
            start = now
            now += STEP + GUESS * guessing
            if stall:
                put(EventKind.STALL, layer, 0, now, now + stall, 0, token)
                now += stall
            parts = [Part.TOP, Part.BOTTOM] * 2 if token % 2 else [Part.WHOLE] * 2
            for part in parts:
                size = {Part.TOP: top_rows, Part.BOTTOM: NEURONS - top_rows, Part.WHOLE: NEURONS}[part]
                put(EventKind.COMPUTE, layer, part, now, now + SEGMENT + ROW * size, 0, token)
                now += SEGMENT + ROW * size
            put(EventKind.STEP, layer, 0, start, now, 0, token)
            if moved:
                put(EventKind.DEMAND, layer, 0, start, start + moved / 5e8, moved, token)
        now += AFTER
        put(EventKind.TOKEN, -1, 0, began, now, 0, token)
    return Run(np.array(rows, EVENT), (top_rows,) * layers, guessing)


def test_known_costs_come_back() -> None:
    costs = fit_costs([run(30, False), run(30, True), run(70, True, stall=3e-3)], [NEURONS] * 3, 4096, LINK)
    for number, layer in enumerate(costs.layers):
        assert layer.before_s == pytest.approx(BEFORE * (1 + number), rel=1e-6)
        assert layer.step_s == pytest.approx(STEP, rel=1e-6)
        assert layer.guess_s == pytest.approx(GUESS, rel=1e-6)
        assert layer.segment_s == pytest.approx(SEGMENT, rel=1e-6)
        assert layer.row_s == pytest.approx(ROW, rel=1e-6)
        assert layer.admit_s == LINK.copy_s_per_byte
    assert costs.after_s == pytest.approx(AFTER, rel=1e-6)
    assert (costs.link_bytes_per_s, costs.link_latency_s, costs.chunk_bytes) == (1e9, 1e-5, 4096)
    assert costs.source == "measured"


def test_the_link_s_rate_is_what_it_reached_beside_compute() -> None:
    costs = fit_costs([run(30, True, moved=50_000)], [NEURONS] * 3, 4096, LINK)
    assert costs.link_bytes_per_s == pytest.approx(5e8, rel=1e-6)


def test_one_odd_token_changes_nothing() -> None:
    steady, odd = run(30, True, tokens=9), run(30, True, tokens=9)
    events = odd.events.copy()
    late = (events["token"] == 4) & (events["kind"] == EventKind.COMPUTE)
    events["end_s"][late] += 0.5
    mine = fit_costs([steady], [NEURONS] * 3, 4096, LINK).layers[0]
    theirs = fit_costs([Run(events, odd.top_rows, True)], [NEURONS] * 3, 4096, LINK).layers[0]
    assert theirs.row_s == pytest.approx(mine.row_s, rel=1e-6)
    assert theirs.segment_s == pytest.approx(mine.segment_s, rel=0.05)


def test_nothing_is_below_zero_and_no_tokens_cost_nothing() -> None:
    empty = Run(np.array([], EVENT), (30,), False)
    costs = fit_costs([empty], [NEURONS], 4096, LINK)
    assert costs.after_s == 0
    assert all(value == 0 for value in (costs.layers[0].before_s, costs.layers[0].row_s, costs.layers[0].segment_s))


def test_what_small_transfers_take_longer_is_latency() -> None:
    rows, start = [], 1.0
    for token, (count, nbytes) in enumerate([(1, 4096), (2, 4096), (4, 4096), (1, 40960), (3, 40960)]):
        for expert in range(count):
            end = start + 2e-4 + nbytes / 1e8
            rows.append((EventKind.DEMAND, TracePhase.DECODE, Part.WHOLE, 0, expert, 1, token, nbytes, start, end))
            start = end
        start += 1.0
    costs = fit_costs([Run(np.array(rows, EVENT), (30,), False)], [NEURONS], 4096, LINK)
    assert costs.link_latency_s == pytest.approx(2e-4, rel=1e-6)
    assert costs.link_bytes_per_s == pytest.approx(1e8, rel=1e-6)
