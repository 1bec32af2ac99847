"""One layer in exact seconds, what holds for every layer, and whole tokens against the discrete-event simulator."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_routing import Toy, toy_costs, toy_layer, toy_trace

from moepic_core.budgets import Needs
from moepic_core.cost_model import LayerTimes, breakdown, layer_times, pieces, predict, table, walk
from moepic_core.costs import Costs, LayerCosts
from moepic_core.geometry import record_stride, segment, top_bytes
from moepic_core.simulator import simulate
from moepic_core.spec import MoeLayer, Plan, Settings
from moepic_core.uniform import uniform_plan
from moepic_core.workload import Found, LayerTokens, Workload, replay, workload

# Ten neurons of one alignment unit each: on this machine an expert travels for 10 s and computes for 1 s.
LAYER = MoeLayer(0, num_experts=4, neurons=10, hidden=1024, matrices=1, itemsize=4)
COSTS = LayerCosts(before_s=3.0, step_s=0.0, guess_s=0.0, segment_s=0.0, row_s=0.1, admit_s=0.0, transfer_s=0.0)
MACHINE = Costs((COSTS,), 0.0, link_bytes_per_s=4096, link_latency_s=0.0, chunk_bytes=4096, source="measured")


def times(
    rows: int, window_s: float = 0.0, costs: LayerCosts = COSTS, machine: Costs = MACHINE, **found: float
) -> LayerTimes:
    size = pieces(LAYER, costs, machine, np.array([rows]))
    names: dict[str, Any] = dict.fromkeys(Found._fields, 0) | found
    return layer_times(
        size, costs.guess_s, machine, Found(**{name: np.array([names[name]]) for name in names}), window_s
    )


@pytest.mark.parametrize(
    ("rows", "found", "compute_s", "stall_s", "demand_s"),
    [
        (10, {"hits": 2}, 2, 0, 0),  # whole and cached
        (10, {"misses": 2}, 2, 19, 20),  # the first computes while the second travels
        (10, {"hits": 1, "misses": 1}, 2, 9, 10),  # the cached one computes first
        (5, {"hits": 1}, 1, 4.5, 5),  # the top computes while the bottom travels
        (5, {"hits": 2}, 2, 8.5, 10),
        (5, {"misses": 1}, 1, 9.5, 10),  # its top computes while its bottom travels
        (5, {"hits": 1, "misses": 1}, 2, 13.5, 15),
        (0, {"misses": 2}, 2, 19, 20),  # nothing to cache, all of it travels in one piece
    ],
)
def test_demands(rows: int, found: dict[str, float], compute_s: float, stall_s: float, demand_s: float) -> None:
    result = times(rows, **found)
    assert [float(part[0]) for part in (result.compute_s, result.stall_s, result.demand_s)] == [
        compute_s, pytest.approx(stall_s), pytest.approx(demand_s),
    ]  # fmt: skip
    assert result.prefetch_s == result.wasted_s == 0


@pytest.mark.parametrize(
    ("rows", "window_s", "found", "stall_s", "link_s", "wasted_s"),
    [
        (10, 10, {"misses": 1, "guessed_misses": 1}, 0, 10, 0),  # in time
        (10, 4, {"misses": 1, "guessed_misses": 1}, 6, 10, 0),  # what is left of it goes on as a demand
        (10, 4, {"misses": 2, "guessed_misses": 1}, 15, 20, 0),  # and the other one follows
        (5, 4, {"hits": 1, "guessed_hits": 1}, 0.5, 5, 0),  # 1 s of the bottom is left when its top begins to compute
        (10, 99, {"hits": 1, "wrong": 1}, 0, 10, 10),  # all of a wrong guess
        (10, 6, {"misses": 1, "wrong": 1}, 10.5, 16.5, 6.5),  # the chunk under way keeps the demand waiting
        (10, 6, {"misses": 1, "guessed_misses": 1, "wrong": 1}, 7.25, 13.25, 3.25),  # half of it was spent on the wrong
        (10, 6, {"misses": 1, "guessed_misses": 1, "wrong": 1, "skew": 1}, 5.15, 11.15, 1.15),
        (10, 6, {"misses": 1, "guessed_misses": 1, "wrong": 1, "wrong_hits": 1}, 4, 10, 0),  # whole and cached
    ],
)
def test_guesses(
    rows: int, window_s: float, found: dict[str, float], stall_s: float, link_s: float, wasted_s: float
) -> None:
    result = times(rows, window_s, **found)
    link = float(result.prefetch_s[0] + result.demand_s[0])
    assert (float(result.stall_s[0]), link, float(result.wasted_s[0])) == pytest.approx((stall_s, link_s, wasted_s))


def test_overheads_are_counted() -> None:
    costs = LayerCosts(0, 0, guess_s=0.5, segment_s=0.25, row_s=0.1, admit_s=1 / 4096, transfer_s=0.125)
    machine = dataclasses.replace(MACHINE, link_latency_s=2.0)
    result = times(5, 100, costs, machine, hits=1, misses=2, guessed_misses=1, admitted=1)
    # A guess, three experts, one copied top; a bottom and two whole experts in two transfers each.
    assert result.compute_s == pytest.approx(0.5 + 3 * (2 * 0.25 + 1) + 5 + 5 * 0.125)
    assert result.prefetch_s == pytest.approx(10 + 2 * 2)  # two transfers
    assert result.demand_s == pytest.approx(5 + 2 + 10 + 2 * 2)
    slower = dataclasses.replace(costs, drag=0.25)
    dragged = times(5, 100, slower, machine, hits=1, misses=2, guessed_misses=1, admitted=1)
    assert dragged.compute_s - result.compute_s == pytest.approx(0.25 * (10 + 2 * 2 + 5 + 2 + 10 + 2 * 2))


def test_a_whole_expert_is_admitted_for_nothing() -> None:
    costs = dataclasses.replace(COSTS, admit_s=1 / 4096)
    copied, exchanged = (times(rows, 100, costs, misses=1, guessed_misses=1, admitted=1) for rows in (5, 10))
    assert copied.compute_s == pytest.approx(1 + 5)
    assert exchanged.compute_s == pytest.approx(1)


@pytest.mark.parametrize("layer", [LAYER, toy_layer(37, 33), MoeLayer(0, 2, 3, 1000, 2, 2)])
def test_pieces_are_those_of_the_geometry(layer: MoeLayer) -> None:
    rows = np.arange(layer.neurons + 1)
    size = pieces(layer, COSTS, MACHINE, rows)
    for row in rows.tolist():
        bottom = segment(layer, row, layer.neurons).nbytes if row < layer.neurons else 0
        assert size.hit_bytes[row] == bottom
        assert size.miss_bytes[row] == bottom + top_bytes(layer, row)
        assert size.top_link_s[row] == top_bytes(layer, row) / 4096
        assert size.top_s[row] + size.bottom_s[row] == pytest.approx(layer.neurons * 0.1)
    assert size.hit_bytes[0] == size.miss_bytes[-1] == record_stride(layer)


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    uses, right = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    right = min(right, uses)
    hits = draw(st.integers(0, uses))
    guessed_hits = draw(st.integers(max(0, right - (uses - hits)), min(right, hits)))
    wrong = draw(st.integers(0, 4))
    return {
        "hits": hits, "guessed_hits": guessed_hits, "misses": uses - hits, "guessed_misses": right - guessed_hits,
        "wrong": wrong, "wrong_hits": draw(st.integers(0, wrong)), "skew": draw(st.floats(0, 1)),
    }  # fmt: skip


machines = st.builds(
    Costs, st.just((COSTS,)), st.just(0.0), st.floats(100, 1e6), st.floats(0, 2), st.sampled_from([4096, 1 << 20]),
    st.just("measured"),
)  # fmt: skip
steps = st.builds(LayerCosts, *[st.floats(0, 3)] * 5, st.just(0.0), st.floats(0, 3), st.floats(0, 1))


@given(situations(), machines, steps, st.integers(1, 10), st.floats(0, 50), st.floats(0, 50), st.floats(1, 20))
def test_what_holds_for_every_layer(
    found: dict[str, Any], machine: Costs, costs: LayerCosts, rows: int, window_s: float, more_s: float, faster: float
) -> None:
    """One hit more, a longer window and a faster link never cost time; no second of the link is counted twice."""

    def seconds(result: LayerTimes) -> float:
        return float(result.compute_s[0] + result.stall_s[0])

    result = times(rows, window_s, costs, machine, **found)
    slack = 1e-9 * (1 + seconds(result))
    assert 0 <= result.stall_s <= result.demand_s + slack
    assert 0 <= result.late <= 1 and 0 <= result.prefetch_s <= window_s + slack
    assert -slack <= result.wasted_s <= result.prefetch_s + result.demand_s + slack
    assert seconds(times(rows, window_s + more_s, costs, machine, **found)) <= seconds(result) + slack
    link = dataclasses.replace(machine, link_bytes_per_s=machine.link_bytes_per_s * faster)
    assert seconds(times(rows, window_s, costs, link, **found)) <= seconds(result) + slack
    if found["misses"] > found["guessed_misses"]:
        better = found | {"hits": found["hits"] + 1, "misses": found["misses"] - 1}
        assert seconds(times(rows, window_s, costs, machine, **better)) <= seconds(result) + slack
    if found["guessed_misses"]:
        better = found | {"hits": found["hits"] + 1, "misses": found["misses"] - 1}
        better |= {"guessed_hits": found["guessed_hits"] + 1, "guessed_misses": found["guessed_misses"] - 1}
        assert seconds(times(rows, window_s, costs, machine, **better)) <= seconds(result) + slack


def tokens_with(hits: list[int], uses: int = 2) -> LayerTokens:
    """Tokens of which each finds so many hits with one slot or more, and guesses nothing."""
    none = np.zeros(len(hits), np.int16)
    rows = np.array([none, *[hits] * 4], np.int16)
    return LayerTokens(
        rows, np.zeros_like(rows), np.zeros_like(rows), none + np.int16(uses), none, none, none.astype(float)
    )


def test_even_hits_stall_less_than_uneven_ones() -> None:
    """Stalls are convex in what is missing: the second miss of a token waits in full, the first is partly hidden."""
    machine = dataclasses.replace(MACHINE, link_bytes_per_s=4096 * 8)  # an expert travels for 1.25 s
    plan = np.array([[2]]), np.array([[10]])
    stalls = []
    for hits in ([1, 1, 1, 1], [1, 1, 2, 0], [0, 2, 0, 2]):
        work = Workload(0, (tokens_with(hits),))
        stalls.append(float(walk(work, (LAYER,), machine, *plan, itemised=True).stall_s[0]))
    assert stalls == pytest.approx([0.25, 0.5, 0.75])


def test_a_token_adds_up() -> None:
    toy = Toy(7)
    plan = plan_for(toy, 0.5, split=0.5)
    result = predict(plan, toy.layers, toy.costs, toy.trace)
    parts = result.before_s + result.experts_s + result.stall_s + result.after_s
    assert result.total_s == pytest.approx(parts)
    assert result.before_s == pytest.approx(len(toy.layers) * 4e-5) and result.after_s == 1e-4
    assert result.hit_rate + result.partial_hit_rate + result.miss_rate == pytest.approx(1)
    assert result.link_s * toy.costs.link_bytes_per_s >= result.link_bytes > 0
    assert 0 <= result.overlap <= 1


def test_what_travels_without_guesses_is_what_misses() -> None:
    toy = Toy(7)
    plan = plan_for(toy, 0.5, split=1.0, prefetch="off")
    result = predict(plan, toy.layers, toy.costs, toy.trace)
    uses = len(toy.layers) * toy.top_k
    assert result.link_bytes == pytest.approx(result.miss_rate * uses * record_stride(toy.layer))
    assert result.partial_hit_rate == 0
    assert result.link_s == pytest.approx(
        result.link_bytes / toy.costs.link_bytes_per_s + result.miss_rate * uses * 1e-7
    )


def test_all_resident_costs_no_link_time() -> None:
    toy = Toy(7)
    result = predict(plan_for(toy, 1.0, split=1.0), toy.layers, toy.costs, toy.trace)
    assert result.stall_s == 0 and result.hit_rate > 0.99  # an expert's first use is a miss
    assert result.link_s < 1e-5
    experts_s = len(toy.layers) * (1e-5 + toy.top_k * 2.5e-5)
    assert result.experts_s == pytest.approx(experts_s, rel=0.01)  # and nobody asks the next router


def plan_for(toy: Toy, share: float, **settings: object) -> Plan:
    budget = toy.staged + int(share * (toy.needs.everything - toy.staged))
    return uniform_plan(Settings.create(checkpoint="x", **settings), toy.needs, budget)


def test_many_plans_at_once_are_each_alone() -> None:
    toy = Toy(11)
    plans = [plan_for(toy, share, split=split).layers for share in (0.2, 0.6) for split in (0.0, 0.4, 1.0)]
    work = workload_of(toy)
    together = walk(work, toy.layers, toy.costs, *table(*plans), itemised=True)
    for row, plan in enumerate(plans):
        alone = walk(work, toy.layers, toy.costs, *table(plan), itemised=True)
        assert breakdown(together, row, toy.costs) == breakdown(alone, 0, toy.costs)
        assert float(together.total_s[row]) == pytest.approx(breakdown(alone, 0, toy.costs).total_s)


def workload_of(toy: Toy) -> Workload:
    return workload(replay(toy.trace, "lcp", "next-router"), toy.top_k)


@pytest.mark.parametrize("seed", range(25))
def test_more_slots_or_a_faster_link_never_slow_a_plan_down(seed: int) -> None:
    """Through all layers and windows, as long as copying newcomers costs nothing."""
    toy, work = Toy(seed), workload_of(Toy(seed))
    slots = np.arange(toy.layer.num_experts + 1)[:, None].repeat(len(toy.layers), axis=1)
    for rows in {1, toy.layer.neurons // 2 or 1, toy.layer.neurons}:
        plans = slots[1:], np.full_like(slots[1:], rows)
        seconds = walk(work, toy.layers, toy.costs, *plans).total_s
        assert (np.diff(seconds) <= 1e-12).all()
        for faster in (1.01, 2, 100):
            costs = dataclasses.replace(toy.costs, link_bytes_per_s=faster * toy.costs.link_bytes_per_s)
            assert (walk(work, toy.layers, costs, *plans).total_s <= seconds + 1e-12).all()


@pytest.mark.parametrize("ratio", [0.7, 2.9, 6])
@pytest.mark.parametrize("prefetch", ["on", "off"])
@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("drag", [0.0, 0.15])
def test_tokens_take_as_long_as_in_the_simulator(ratio: float, prefetch: str, split: float, drag: float) -> None:
    """Within 4 %: another program, event by event, chunk by chunk, with real queues."""
    layer = toy_layer(40, 512, 16)
    layers, needs = (layer,) * 4, Needs((layer,) * 4, 3, 0, 0, 0)
    trace = toy_trace(1, 240, 4, 16, 3)
    costs = toy_costs(layer, 4, 3, ratio, drag=drag)
    for share in (0.25, 0.6):
        budget = needs.smallest + int(share * (needs.everything - needs.smallest))
        settings = Settings.create(checkpoint="x", split=split, prefetch=prefetch)
        plan = uniform_plan(settings, needs, budget)
        predicted = predict(plan, layers, costs, trace)
        truth = simulate(trace, plan, costs, layers, warm_up=60).breakdown
        assert predicted.total_s == pytest.approx(truth.total_s, rel=0.04), (share, predicted, truth)
        assert predicted.link_bytes == pytest.approx(truth.link_bytes, rel=0.06)
        assert predicted.wasted_s == pytest.approx(truth.wasted_s, rel=0.25, abs=0.01 * truth.link_s)
        assert predicted.covered_s == pytest.approx(truth.covered_s, rel=0.1, abs=0.05 * truth.link_s)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_short_trace_finds_what_earlier_tokens_left(share: float) -> None:
    """As in the simulator; alone it would find large caches all but empty."""
    layer = toy_layer(40, 512, 16)
    layers, needs = (layer,) * 4, Needs((layer,) * 4, 3, 0, 0, 0)
    earlier, costs = toy_trace(1, 400, 4, 16, 3), toy_costs(layer, 4, 3, 2.9)
    short = earlier.last(30)
    budget = needs.smallest + int(share * (needs.everything - needs.smallest))
    plan = uniform_plan(Settings.create(checkpoint="x", split=1.0), needs, budget)
    known = predict(plan, layers, costs, short, warm_up=10, earlier=earlier)
    truth = simulate(short, plan, costs, layers, warm_up=10, earlier=earlier).breakdown
    assert known.total_s == pytest.approx(truth.total_s, rel=0.04)
    assert known.link_bytes == pytest.approx(truth.link_bytes, rel=0.06)
    alone = predict(plan, layers, costs, short, warm_up=10)
    assert share < 0.5 or alone.link_bytes > 1.3 * known.link_bytes
