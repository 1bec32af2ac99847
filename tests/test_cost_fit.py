"""Costs fitted to events: made-up runs with known costs come back, and what does not vary is not invented."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.cost_fit import computing, fit_costs
from moepic_core.costs import LinkSpeed
from moepic_core.recordings import Run, bursts, link_shares
from moepic_core.trace import EVENT, Coverage, EventKind, Part, TracePhase

BEFORE, STEP, GUESS, SEGMENT, ROW, AFTER, TRANSFER, ADMIT = 1e-3, 2e-4, 5e-5, 3e-5, 1e-6, 4e-3, 7e-5, 3e-10
BUSY_ROW = 1.5e-6  # beside a busy link
NEURONS = 100
LINK = LinkSpeed(bytes_per_s=1e9, latency_s=1e-5, copy_s_per_byte=1e-10, host_bytes_per_s=1e10)


def run(
    top_rows: int, guessing: bool, layers: int = 3, tokens: int = 6, stall: float = 0.0, moved: int = 0, loads: int = 0
) -> Run:
    """Tokens of which every second one uses two experts as top and bottom, the others two whole ones. With `loads`
    none to two transfers are handed over in each step.
    """
    rows, now = [], 10.0

    def put(
        kind: EventKind, layer: int, part: int, start: float, end: float, nbytes: int, token: int, expert: int = -1
    ) -> None:
        rows.append((kind, TracePhase.DECODE, part, layer, expert, 1, token, nbytes, start, end))

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
            for expert in range(loads * (token + layer) % 3):
                # One in two chunks, of this layer; or a guess for the next one, whose first layer is the next token's.
                arrived, after = now + TRANSFER + LINK.latency_s, (layer + 1) % layers
                if guessing and expert:
                    put(EventKind.PREFETCH, after, 0, arrived, arrived + 1e-6, 1000, token + (after == 0), expert)
                else:
                    put(EventKind.DEMAND, layer, 0, start + 1e-6, start + 2e-6, 1000, token, expert)
                    put(EventKind.DEMAND, layer, 0, start + 2e-6, start + 3e-6, 1000, token, expert)
                now += TRANSFER
                if guessing:
                    put(EventKind.ADMIT, layer, 1, now, now + 4096 * ADMIT, 4096, token, expert)
                    now += 4096 * ADMIT
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


def test_what_transfers_and_admissions_cost_is_told_apart() -> None:
    runs = [run(30, False, tokens=9, loads=1), run(30, True, tokens=9, loads=1), run(70, True, tokens=9, loads=1)]
    costs = fit_costs(runs, [NEURONS] * 3, 4096, LINK)
    found = (STEP, GUESS, SEGMENT, ROW, ADMIT, TRANSFER)
    for layer in costs.layers:
        names = (layer.step_s, layer.guess_s, layer.segment_s, layer.row_s, layer.admit_s, layer.transfer_s)
        assert names == pytest.approx(found, rel=1e-6)
    for each in runs:
        assert computing(each, [NEURONS] * 3, costs) == pytest.approx(np.ones(9), rel=0.01)


def beside_link(shares: Sequence[float]) -> Run:
    """Tokens of one layer with three segments each, of three lengths. The link is busy for the beginning of each."""
    rows, now = [], 10.0

    def put(kind: EventKind, part: int, start: float, end: float, nbytes: int, token: int, expert: int) -> None:
        rows.append((kind, TracePhase.DECODE, part, 0, expert, 1, token, nbytes, start, end))

    for token, share in enumerate(shares):
        start = now
        for expert, (part, size) in enumerate([(Part.WHOLE, NEURONS), (Part.TOP, 30), (Part.BOTTOM, 70)]):
            idle_s = SEGMENT + ROW * size
            # Of `share` of the time beside the link: rows of both speeds, the segment's own time at the slower pace.
            seconds = SEGMENT + size * ((1 - share) * ROW + share * BUSY_ROW)
            assert seconds >= idle_s
            put(EventKind.COMPUTE, part, now, now + seconds, 0, token, expert)
            if share:
                put(EventKind.DEMAND, 0, now, now + share * seconds, 1000, token, 10 + expert)
            now += seconds
        put(EventKind.STEP, 0, start, now, 0, token, -1)
        put(EventKind.TOKEN, 0, start, now, 0, token, -1)
    return Run(np.array(rows, EVENT), (30,), False)


def test_computing_is_slower_beside_a_busy_link() -> None:
    (layer,) = fit_costs([beside_link([0, 0.25, 0.5, 0.75, 1] * 3)], [NEURONS], 4096, LINK).layers
    assert (layer.segment_s, layer.row_s) == pytest.approx((SEGMENT, ROW), rel=1e-6)
    # Each row beside the link took so much longer, and the link was busy for that share of three segments' time.
    shares = np.array([0, 0.25, 0.5, 0.75, 1])
    seconds = 3 * SEGMENT + 2 * NEURONS * ((1 - shares) * ROW + shares * BUSY_ROW)
    lost_s = 2 * NEURONS * (BUSY_ROW - ROW) * shares.sum()
    assert layer.drag == pytest.approx(lost_s / (shares * seconds).sum(), rel=1e-6)


@pytest.mark.parametrize("share", [0, 1])
def test_a_link_that_is_always_or_never_busy_drags_nothing(share: float) -> None:
    """There is nothing to compare with: computing takes what it takes."""
    (layer,) = fit_costs([beside_link([share] * 6)], [NEURONS], 4096, LINK).layers
    assert layer.drag == 0
    assert layer.row_s == pytest.approx(BUSY_ROW if share else ROW, rel=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=8),
)
def test_the_share_of_the_link_is_counted_in_instants(
    moves: list[tuple[int, int]], computes: list[tuple[int, int]]
) -> None:
    def events(kind: EventKind, times: list[tuple[int, int]]) -> np.ndarray:
        return np.array([(kind, 1, 0, 0, 0, 1, 0, 0, start, start + length) for start, length in times], EVENT)

    moved = np.sort(events(EventKind.DEMAND, moves), order="start_s")
    busy = {instant for start, length in moves for instant in range(start, start + length)}
    wanted = [len(busy & set(range(start, start + length))) / length if length else 0.0 for start, length in computes]
    assert link_shares(events(EventKind.COMPUTE, computes), moved).tolist() == pytest.approx(wanted)


def test_scores_of_all_runs_count_together() -> None:
    first, second = np.array([[[3, 0]], [[4, 0]]]), np.array([[[1, 0]], [[4, 2]]])
    runs = [run(30, False), *(dataclasses.replace(run(30, True), scores=scores) for scores in (first, second))]
    assert fit_costs(runs, [NEURONS] * 3, 4096, LINK).guess_accuracy == ((5 / 10, 1 / 4),)
    assert fit_costs(runs[:1], [NEURONS] * 3, 4096, LINK).guess_accuracy == ()


def test_the_link_s_rate_is_what_it_reached_beside_compute() -> None:
    runs = [run(30, True, moved=50_000), run(30, True, moved=10_000), run(30, True, moved=2_000)]
    costs = fit_costs(runs, [NEURONS] * 3, 4096, LINK)
    assert costs.link_bytes_per_s == pytest.approx(5e8, rel=1e-6)
    assert costs.link_latency_s == pytest.approx(0, abs=1e-9)


def test_transfers_of_one_size_do_not_change_the_link_s_rate() -> None:
    costs = fit_costs([run(30, True, moved=50_000)], [NEURONS] * 3, 4096, LINK)
    assert costs.link_bytes_per_s == pytest.approx(LINK.bytes_per_s)
    assert costs.link_latency_s == pytest.approx(50_000 / 5e8 - 50_000 / LINK.bytes_per_s, rel=1e-6)


def moving(nbytes: Sequence[int], latency_s: float, bytes_per_s: float, noise: float) -> Run:
    """Tokens that each fetch one to three experts of one of the sizes."""
    rows, start, generator = [], 1.0, np.random.default_rng(0)
    for token in range(240):
        size = nbytes[token % len(nbytes)]
        for expert in range(1 + token // len(nbytes) % 3):
            end = start + (latency_s + size / bytes_per_s) * (1 + noise * generator.standard_exponential())
            rows.append((EventKind.DEMAND, TracePhase.DECODE, Part.WHOLE, 0, expert, 1, token, size, start, end))
            start = end
        start += 1.0
    return Run(np.array(rows, EVENT), (30,), False)


@pytest.mark.parametrize(
    ("sizes", "bytes_per_s"),
    [((98_304,), 1e10), ((98_304, 40_960), 1e10), ((40_960, 3 << 20), 1e10), ((40_960, 3 << 20), 2e9)],
)
def test_small_and_large_transfers_are_both_predicted(sizes: tuple[int, ...], bytes_per_s: float) -> None:
    """Noise of a shared machine, small sizes close together; the last one is slower beside compute than alone."""
    found = [moving(sizes, 6e-5, bytes_per_s, noise=0.3)]
    costs = fit_costs(found, [NEURONS], 4096, LinkSpeed(1e10, 1e-5, 1e-10, 1e10))
    for size in (8_192, 40_960, 98_304, 3 << 20):
        expected = 6e-5 + size / bytes_per_s
        assert costs.link_latency_s + size / costs.link_bytes_per_s == pytest.approx(expected, rel=0.4), size


def test_the_link_is_no_slower_than_seen_when_it_was_disturbed_alone() -> None:
    costs = fit_costs([moving((1 << 20,), 0.0, 1e10, noise=0.0)], [NEURONS], 4096, LinkSpeed(1e9, 1e-5, 1e-10, 1e10))
    assert costs.link_bytes_per_s == pytest.approx(1e10, rel=1e-6)


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


def test_the_error_is_how_far_fitted_tokens_are_from_the_fit() -> None:
    runs = [run(30, False), run(30, True), run(70, True, stall=3e-3)]
    costs = fit_costs(runs, [NEURONS] * 3, 4096, LINK)
    assert costs.error == pytest.approx(0, abs=1e-6)
    for each in runs:
        assert computing(each, [NEURONS] * 3, costs) == pytest.approx(np.ones(6))
    events = runs[2].events.copy()
    made = np.flatnonzero(events["kind"] == EventKind.TOKEN)[1:]
    events["end_s"][made] += 0.25 * (events["end_s"] - events["start_s"])[made] - 0.25 * 3 * 3e-3
    slower = Run(events, runs[2].top_rows, True)
    assert computing(slower, [NEURONS] * 3, costs) == pytest.approx(np.full(6, 1.25))
    half = fit_costs([runs[0], slower], [NEURONS] * 3, 4096, LINK)
    assert 0.05 < half.error < 0.25


moves = st.tuples(
    st.sampled_from([EventKind.DEMAND, EventKind.PREFETCH]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3),
    st.sampled_from(list(Part)), st.integers(1, 100), st.integers(0, 50), st.integers(1, 30),
)  # fmt: skip


@given(st.lists(moves, min_size=1, max_size=40))
def test_bursts_are_united_intervals(found: list[tuple[int, ...]]) -> None:
    events = np.array([
        (kind, TracePhase.DECODE, part, layer, expert, 1, token, nbytes, float(start), float(start + length))
        for kind, token, layer, expert, part, nbytes, start, length in found
    ], EVENT)  # fmt: skip
    expected = {}
    for row in np.sort(events, order="start_s"):
        of_burst = expected.setdefault((row["kind"], row["token"], row["layer"]), (set(), [0], Coverage()))
        of_burst[0].add((row["expert"], row["part"]))
        of_burst[1][0] += row["nbytes"]
        of_burst[1].append(of_burst[2].add(float(row["start_s"]), float(row["end_s"])))
    wanted = [(len(pieces), counted[0], sum(counted[1:])) for _, (pieces, counted, _) in sorted(expected.items())]
    assert bursts(events) == pytest.approx(np.array(wanted, float))
