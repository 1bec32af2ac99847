"""The simulator against the engine's own residency, use by use, and against timelines worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from null_transfer import NullTransfer
from rig import NUM_EXPERTS, NUM_LAYERS, TOP_K, Rig, model_spec

from moepic_core.costs import Costs, LayerCosts
from moepic_core.geometry import top_rows
from moepic_core.routing import RoutingTrace
from moepic_core.simulated_residency import SimulatedResidency
from moepic_core.simulated_step import run_token
from moepic_core.simulator import Simulation, simulate
from moepic_core.spec import LayerPlan, MemoryPlan, Plan
from moepic_core.step import Step
from moepic_core.trace import EventKind, Part

LAYERS = model_spec().moe_layers  # 40 neurons, a record of 16 KiB: 4 alignment units
# Computation takes no time and layers are far apart: what is guessed has landed before its layer runs.
FAR_APART = Costs((LayerCosts(1000.0, 0, 0, 0, 0, 0, 0),) * NUM_LAYERS, 1000.0, 4096.0, 0.0, 4096, "measured")


def plan(split: float, slots: int, staging: int = 2 * TOP_K, **changes: object) -> Plan:
    rows = top_rows(LAYERS[0], split)
    simple = Plan(
        layers=(LayerPlan(slots, rows, split),) * NUM_LAYERS, staging_records=staging, eviction="lcp",
        predictor="none", prefetch_depth=TOP_K, misses="fetch", memory=MemoryPlan(0, 0, 0, 0, 0, 10**9),
        strategy="moepic", reason="by the test",
    )  # fmt: skip
    return replace(simple, **changes)


def routing(
    experts: list[list[list[int]]], guesses: list[list[list[int]]] | None = None, reply: int = 1
) -> RoutingTrace:
    """From lists [tokens][layers][k]; all of one reply."""
    used = np.array(experts, np.int16)
    guessed = np.empty((*used.shape[:2], 0), np.int16) if guesses is None else np.array(guesses, np.int16)
    tokens = len(used)
    return RoutingTrace(
        used, guessed, (NUM_EXPERTS,) * used.shape[1], np.full(tokens, reply, np.int32), np.zeros(tokens, np.int16),
        ("unknown",), "made by hand",
    )  # fmt: skip


def random_routing(tokens: int, seed: int) -> RoutingTrace:
    """Guesses are right in half of the cases; two replies; some tokens use one expert instead of two."""
    generator = np.random.default_rng(seed)
    shape = (tokens, NUM_LAYERS, NUM_EXPERTS)
    order = (generator.random(shape) + np.linspace(0, 1, NUM_EXPERTS)).argsort(axis=2).astype(np.int16)
    experts, guesses = order[..., :TOP_K].copy(), order[..., [0, TOP_K]].copy()
    experts[generator.random((tokens, NUM_LAYERS)) < 0.1, 1] = -1
    guesses[generator.random((tokens, NUM_LAYERS)) < 0.2, 1] = -1
    replies = (np.arange(tokens) >= tokens // 2).astype(np.int32)
    return RoutingTrace(
        experts, guesses, (NUM_EXPERTS,) * NUM_LAYERS, replies, np.zeros(tokens, np.int16), ("unknown",), "random"
    )


def by_residency(
    trace: RoutingTrace, chosen: Plan, compare: SimulatedResidency | None = None, earlier: RoutingTrace | None = None
) -> Rig:
    """The real residency over the same routing, with guesses that land before their layer runs."""
    rig = Rig(NullTransfer())
    residency = rig.residency
    residency.apply(chosen)
    if earlier is not None:
        residency.remember(earlier)
        residency.warm_up()
    tokens, replies = trace.experts.tolist(), trace.replies.tolist()
    for token, experts in enumerate(tokens):
        new_reply = token == 0 or replies[token] != replies[token - 1]
        goes_on = token + 1 < len(tokens) and replies[token + 1] == replies[token]
        following = [*trace.guesses[token, 1:].tolist(), trace.guesses[token + 1, 0].tolist() if goes_on else []]
        if new_reply:
            residency.begin_reply()
        residency.begin_pass(1)
        for layer, used in enumerate(experts):
            with Step(residency, layer, {expert: 1 for expert in used if expert >= 0}) as step:
                after = (layer + 1) % NUM_LAYERS
                if residency.wants_guesses(after):
                    ranked = following[layer] if residency.matrices is None else residency.matrices.rank(after)
                    residency.prefetch(after, [expert for expert in ranked if expert >= 0])
                for _ in step:
                    pass
            rig.transfer.step(10**6)
            residency.check()
        residency.end_pass()
        if not goes_on:
            residency.forget_guesses()
        if compare is not None:
            if new_reply:
                compare.begin_reply(replies[token])
            run_token(compare, experts, following)
            if not goes_on:
                compare.forget_guesses()
            compare.check()
            cached = [set(cache.expert_to_slot) for cache in residency.caches]
            assert [layer.cached for layer in compare.layers] == cached, token
            assert len(compare.guesses) == len(residency.staging.guesses), token
    return rig


def counted(rig: Rig) -> tuple[list[list[int]], list[int]]:
    """Uses per layer and outcome, and bytes: demanded, prefetched, of those used and wasted."""
    session = rig.telemetry.snapshot().session.both
    return session.counts[:, :3].tolist(), session.counts[:, 3:7].sum(axis=0).tolist()


def counted_by(result: Simulation) -> tuple[list[list[int]], list[int]]:
    nbytes = [result.demand_bytes, result.prefetch_bytes, result.prefetch_used_bytes, result.prefetch_wasted_bytes]
    return result.outcomes.tolist(), nbytes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), split=st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]), slots=st.integers(0, NUM_EXPERTS),
    staging=st.integers(2, 5), eviction=st.sampled_from(["lcp", "lcp-aged", "lru", "lfu", "request-frequency"]),
    predictor=st.sampled_from(["none", "next-router", "activation-matrices"]), depth=st.integers(1, TOP_K),
)  # fmt: skip
def test_takes_the_same_decisions_as_the_residency(
    seed: int, split: float, slots: int, staging: int, eviction: str, predictor: str, depth: int
) -> None:
    trace = random_routing(24, seed)
    chosen = plan(split, slots, staging, eviction=eviction, predictor=predictor, prefetch_depth=depth)
    rig = by_residency(trace, chosen, SimulatedResidency(chosen, FAR_APART, LAYERS, with_events=False))
    assert counted_by(simulate(trace, chosen, FAR_APART, LAYERS)) == counted(rig)


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
def test_without_prefetch_no_time_changes_a_decision(split: float) -> None:
    trace, chosen = random_routing(60, seed=2), plan(split, slots=3, staging=2)
    expected = counted(by_residency(trace, chosen))
    for segment_s, link_bytes_per_s in ((0.0, float("inf")), (1.0, 1e3), (1e-6, 1e9), (0.5, 4096.0)):
        layer = LayerCosts(0.1, 0.1, 0.1, segment_s, 0.01, 1e-6, 0.001)
        costs = Costs((layer,) * NUM_LAYERS, 0.1, link_bytes_per_s, 0.001, 4096, "measured")
        assert counted_by(simulate(trace, chosen, costs, LAYERS)) == expected


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("slots", [3, NUM_EXPERTS])
def test_starts_as_warm_as_the_residency(split: float, slots: int) -> None:
    trace, earlier, chosen = random_routing(12, seed=3), random_routing(20, seed=4), plan(split, slots)
    warm = simulate(trace, chosen, FAR_APART, LAYERS, earlier=earlier)
    assert counted_by(warm) == counted(by_residency(trace, chosen, earlier=earlier))
    assert (warm.tpot_s < simulate(trace, chosen, FAR_APART, LAYERS).tpot_s) == (split > 0)


# Seconds to compute a top of 16 of 40 neurons: 0.25 + 16/64 = 0.5, its bottom: 0.25 + 24/64 = 0.625, both: 0.875.
# A record is 4 chunks, a top 2; a bottom alone is 3, as the unit in which both meet travels with either, else 2.
COSTS = Costs(
    (LayerCosts(before_s=10, step_s=1, guess_s=2, segment_s=0.25, row_s=1 / 64, admit_s=1 / 8192, transfer_s=0),) * 2,
    after_s=3, link_bytes_per_s=4096, link_latency_s=0.5, chunk_bytes=4096, source="estimated",
)  # fmt: skip


def run_small(trace: RoutingTrace, chosen: Plan, costs: Costs = COSTS, **options: object) -> Simulation:
    """As many layers as the trace has."""
    size = trace.experts.shape[1]
    chosen, costs = replace(chosen, layers=chosen.layers[:size]), replace(costs, layers=costs.layers[:size])
    return simulate(trace, chosen, costs, LAYERS[:size], with_events=True, **options)


def timeline(result: Simulation) -> list[tuple[str, int, int, str, int, float, float]]:
    """Events as (kind, layer, expert, part, bytes, start, end) in order of time, without tokens and steps."""
    rows = result.events[result.events["kind"] < EventKind.TOKEN]
    names = ("layer", "expert", "part", "nbytes", "start_s", "end_s", "kind")
    columns = zip(*(rows[name].tolist() for name in names), strict=True)
    found = [
        (EventKind(kind).name, layer, expert, Part(part).name, *rest) for layer, expert, part, *rest, kind in columns
    ]
    return sorted(found, key=lambda row: (row[5], row[6], row[0]))


def test_on_demand_by_hand() -> None:
    result = run_small(routing([[[1, 4], [2, -1]]]), plan(0.0, 0))
    assert timeline(result) == [
        ("DEMAND", 0, 1, "WHOLE", 16384, 10.0, 14.5),
        ("STALL", 0, -1, "WHOLE", 0, 10.0, 14.5),
        ("COMPUTE", 0, 1, "WHOLE", 0, 14.5, 15.375),
        ("DEMAND", 0, 4, "WHOLE", 16384, 14.5, 19.0),
        ("STALL", 0, -1, "WHOLE", 0, 15.375, 19.0),
        ("COMPUTE", 0, 4, "WHOLE", 0, 19.0, 19.875),
        ("DEMAND", 1, 2, "WHOLE", 16384, 30.875, 35.375),
        ("STALL", 1, -1, "WHOLE", 0, 30.875, 35.375),
        ("COMPUTE", 1, 2, "WHOLE", 0, 35.375, 36.25),
    ]
    assert result.token_s.tolist() == [40.25]
    assert result.stall_s.tolist() == [8.125, 4.5]
    steps = result.events[result.events["kind"] == EventKind.STEP]
    assert np.column_stack((steps["start_s"], steps["end_s"])).tolist() == [[10.0, 20.875], [30.875, 37.25]]
    parts = result.breakdown
    assert (parts.before_s, parts.experts_s, parts.stall_s, parts.after_s) == (20, 4.625, 12.625, 3)
    assert (parts.link_s, parts.link_bytes, parts.miss_rate) == (13.5, 3 * 16384, 1.0)


def test_a_cached_top_computes_while_its_bottom_travels_by_hand() -> None:
    result = run_small(routing([[[1, -1]], [[1, -1]]]), plan(0.4, 1), warm_up=1)
    assert timeline(result) == [
        ("COMPUTE", 0, 1, "TOP", 0, 30.625, 31.125),
        ("DEMAND", 0, 1, "BOTTOM", 12288, 30.625, 34.125),
        ("STALL", 0, -1, "WHOLE", 0, 31.125, 34.125),
        ("COMPUTE", 0, 1, "BOTTOM", 0, 34.125, 34.75),
    ]
    assert result.token_s.tolist() == [18.125]
    assert result.outcomes.tolist() == [[0, 1, 0]]
    assert run_small(routing([[[1, -1]]]), plan(0.4, 1)).token_s.tolist() == [20.625]  # the first token: a miss


def test_a_guess_under_way_is_promoted_and_a_wrong_one_is_dropped_by_hand() -> None:
    first, second = COSTS.layers
    costs = replace(COSTS, layers=(first, replace(second, before_s=1)))
    trace = routing([[[1, -1], [3, 2]]], [[[-1, -1], [2, 5]]])
    result = run_small(trace, plan(0.0, 0, predictor="next-router"), costs)
    assert timeline(result) == [
        ("DEMAND", 0, 1, "WHOLE", 16384, 10.0, 14.5),
        ("STALL", 0, -1, "WHOLE", 0, 12.0, 14.5),  # the guess was made before
        ("COMPUTE", 0, 1, "WHOLE", 0, 14.5, 15.375),
        ("PREFETCH", 1, 2, "WHOLE", 12288, 14.5, 18.0),  # the third chunk was under way at 17.375
        ("WASTED", 1, 5, "WHOLE", 0, 17.375, 17.375),
        ("DEMAND", 1, 2, "WHOLE", 4096, 18.0, 19.0),
        ("DEMAND", 1, 3, "WHOLE", 16384, 19.0, 23.5),
        ("COMPUTE", 1, 2, "WHOLE", 0, 19.375, 20.25),  # it has arrived, so 3 does not hold it up
        ("USED", 1, 2, "WHOLE", 16384, 20.25, 20.25),
        ("STALL", 1, -1, "WHOLE", 0, 20.25, 23.5),
        ("COMPUTE", 1, 3, "WHOLE", 0, 23.5, 24.375),
    ]
    assert result.token_s.tolist() == [28.375]
    assert result.outcomes.tolist() == [[1, 0, 0], [2, 0, 0]]
    np.testing.assert_array_equal(result.accuracy, [[np.nan, np.nan], [1, 0]])


def test_a_buffer_serves_again_once_its_last_chunk_has_landed_by_hand() -> None:
    """Both guesses are wrong. The second one's buffer is quiet; into the first one's a chunk travels until 18."""
    first, second = COSTS.layers
    costs = replace(COSTS, layers=(first, replace(second, before_s=1)))
    trace = routing([[[1, -1], [2, 3]]], [[[-1, -1], [5, 6]]])
    result = run_small(trace, plan(0.0, 0, staging=2, predictor="next-router"), costs)
    assert timeline(result)[3:] == [
        ("PREFETCH", 1, 5, "WHOLE", 4096, 14.5, 16.0),
        ("PREFETCH", 1, 5, "WHOLE", 8192, 16.0, 18.0),
        ("WASTED", 1, 5, "WHOLE", 12288, 17.375, 17.375),
        ("WASTED", 1, 6, "WHOLE", 0, 17.375, 17.375),
        ("STALL", 1, -1, "WHOLE", 0, 17.375, 18.0),
        ("DEMAND", 1, 2, "WHOLE", 16384, 18.0, 22.5),
        ("STALL", 1, -1, "WHOLE", 0, 20.0, 22.5),
        ("COMPUTE", 1, 2, "WHOLE", 0, 22.5, 23.375),
        ("DEMAND", 1, 3, "WHOLE", 16384, 22.5, 27.0),
        ("STALL", 1, -1, "WHOLE", 0, 23.375, 27.0),
        ("COMPUTE", 1, 3, "WHOLE", 0, 27.0, 27.875),
    ]
    # One demand alone takes the quiet buffer: it waits for its own bytes, from 17.375 + 2 to 22.5, and nothing else.
    alone = routing([[[1, -1], [2, -1]]], [[[-1, -1], [5, 6]]])
    stalls = [
        row for row in timeline(run_small(alone, plan(0.0, 0, 2, predictor="next-router"), costs)) if row[0] == "STALL"
    ]
    assert stalls[1:] == [("STALL", 1, -1, "WHOLE", 0, 19.375, 22.5)]


def test_a_prefetched_top_is_admitted_at_the_price_of_a_copy_by_hand() -> None:
    trace = routing([[[1, -1], [2, -1]], [[1, -1], [2, -1]]], [[[-1, -1], [2, -1]]] * 2)
    trace = replace(trace, replies=np.array([1, 2], np.int32))  # so nobody guesses for layer 0
    result = run_small(trace, plan(0.4, 1, predictor="next-router"))
    # Layer 0 misses, then hits partly: 10 + 2 + 4.625 + 1, where the guess hides 2 of 6 seconds; layer 1 hits: both
    # segments, and 1 s to copy the top when it is admitted; the next token finds it and needs the bottom alone.
    assert result.outcomes.tolist() == [[1, 1, 0], [0, 0, 2]]
    assert result.token_s.tolist() == [17.625 + 10 + 2 + 1.125 + 1 + 1 + 3, 15.125 + 10 + 2 + 1.125 + 1 + 3]


def test_handing_over_takes_time_while_the_link_is_at_work_by_hand() -> None:
    costs = replace(COSTS, layers=tuple(replace(layer, transfer_s=0.5) for layer in COSTS.layers))
    trace = routing([[[1, -1], [2, -1]]], [[[-1, -1], [5, -1]]])
    result = run_small(trace, plan(0.4, 1, predictor="next-router"), costs)
    assert timeline(result)[:5] == [
        ("DEMAND", 0, 1, "TOP", 8192, 10.0, 12.5),
        ("DEMAND", 0, 1, "BOTTOM", 12288, 12.5, 16.0),  # handed over at 10.5; from 11 to 13 the next router is asked
        ("COMPUTE", 0, 1, "TOP", 0, 14.0, 14.5),  # both segments of a guess have been handed over by now
        ("STALL", 0, -1, "WHOLE", 0, 14.5, 16.0),
        ("COMPUTE", 0, 1, "BOTTOM", 0, 16.0, 16.625),
    ]
    assert result.token_s.tolist() == [38.25]


def test_computing_loses_by_what_travels_beside_it_by_hand() -> None:
    costs = replace(COSTS, layers=tuple(replace(layer, drag=0.25) for layer in COSTS.layers))
    result = run_small(routing([[[1, -1]]]), plan(0.4, 1), costs)
    assert timeline(result)[:5] == [
        ("DEMAND", 0, 1, "TOP", 8192, 10.0, 12.5),
        ("STALL", 0, -1, "WHOLE", 0, 11.5, 12.5),  # a quarter of the link's 6 s is lost
        ("COMPUTE", 0, 1, "TOP", 0, 12.5, 13.0),
        ("DEMAND", 0, 1, "BOTTOM", 12288, 12.5, 16.0),
        ("STALL", 0, -1, "WHOLE", 0, 13.0, 16.0),
    ]


def test_starts_warm_after_earlier_tokens() -> None:
    everyone = routing([[[2 * pair, 2 * pair + 1]] for pair in range(NUM_EXPERTS // 2)])
    token = routing([[[1, 4]]])
    result = run_small(token, plan(1.0, NUM_EXPERTS, predictor="next-router"), earlier=everyone)
    assert result.token_s.tolist() == [10 + 2 * 0.875 + 1 + 3]  # and nothing is guessed for what is all there
    assert (result.breakdown.hit_rate, result.breakdown.link_s, result.breakdown.overlap) == (1.0, 0.0, 1.0)
    assert run_small(token, plan(1.0, 2), earlier=routing([[[4, 1]], [[7, 1]]])).outcomes.tolist() == [[1, 0, 1]]


def test_past_requests_are_prefetched_by_the_second_reply() -> None:
    """The first reply is filed when the second begins, and then says what comes."""
    same = random_routing(2, seed=1)
    trace = replace(
        same, experts=same.experts[[0, 0]], replies=np.array([1, 2], np.int32), guesses=np.empty((2, 3, 0), np.int16)
    )
    result = simulate(trace, plan(0.0, 0, predictor="activation-matrices"), FAR_APART, LAYERS, warm_up=1)
    used = (trace.experts[1] >= 0).sum(axis=1)
    assert result.outcomes.tolist() == [[used[0], 0, 0], [0, 0, used[1]], [0, 0, used[2]]]
    assert result.prefetch_wasted_bytes == used[0] * 16384  # guessed for a third token


COSTS_OF_ALL_KINDS = st.builds(
    lambda before_s, segment_s, chunks_per_s, latency_s, chunk_bytes: Costs(
        (LayerCosts(before_s, 0.5, 0.25, segment_s, 1 / 64, 1e-5, segment_s / 8),) * NUM_LAYERS, 1.5,
        4096 * chunks_per_s, latency_s, chunk_bytes, "measured",
    ),
    st.sampled_from([0.0, 1.0, 20.0]), st.sampled_from([0.0, 0.5]), st.sampled_from([0.5, 2.0, 50.0]),
    st.sampled_from([0.0, 0.75]), st.sampled_from([4096, 12288, 1 << 20]),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    costs=COSTS_OF_ALL_KINDS, seed=st.integers(0, 10**6), split=st.sampled_from([0.0, 0.4, 1.0]),
    slots=st.integers(0, 5), staging=st.integers(2, 4),
    predictor=st.sampled_from(["none", "next-router", "activation-matrices"]),
)  # fmt: skip
def test_events_are_possible_and_add_up_to_the_figures(
    costs: Costs, seed: int, split: float, slots: int, staging: int, predictor: str
) -> None:
    trace = random_routing(12, seed)
    result = simulate(
        trace, plan(split, slots, staging, predictor=predictor), costs, LAYERS, with_events=True, warm_up=0
    )
    events = result.events
    of = {kind: events[events["kind"] == kind] for kind in EventKind}
    seconds = {kind: rows["end_s"] - rows["start_s"] for kind, rows in of.items()}
    runs = np.concatenate((of[EventKind.DEMAND], of[EventKind.PREFETCH]))
    work = np.concatenate((of[EventKind.COMPUTE], of[EventKind.STALL]))
    for one_at_a_time in (np.sort(runs, order="start_s"), np.sort(work, order=("start_s", "end_s"))):
        assert (one_at_a_time["start_s"][1:] >= one_at_a_time["end_s"][:-1] - 1e-9).all()
    for row in of[EventKind.COMPUTE]:
        mine = runs[(runs["layer"] == row["layer"]) & (runs["expert"] == row["expert"])]
        if row["part"] != Part.WHOLE:
            mine = mine[mine["part"] == row["part"]]
        assert (mine["end_s"][mine["start_s"] < row["start_s"]] <= row["start_s"] + 1e-9).all(), row
    assert of[EventKind.DEMAND]["nbytes"].sum() == result.demand_bytes
    assert of[EventKind.PREFETCH]["nbytes"].sum() == result.prefetch_bytes
    assert of[EventKind.USED]["nbytes"].sum() == result.prefetch_used_bytes
    assert of[EventKind.WASTED]["nbytes"].sum() == result.prefetch_wasted_bytes
    assert result.prefetch_used_bytes + result.prefetch_wasted_bytes >= result.prefetch_bytes
    np.testing.assert_allclose(seconds[EventKind.TOKEN], result.token_s)
    np.testing.assert_allclose(of[EventKind.TOKEN]["start_s"][1:], of[EventKind.TOKEN]["end_s"][:-1])
    np.testing.assert_allclose(seconds[EventKind.STALL].sum(), result.stall_s.sum())
    np.testing.assert_allclose(result.token_s.mean(), result.tpot_s)
    link_s = seconds[EventKind.DEMAND].sum() + seconds[EventKind.PREFETCH].sum()
    np.testing.assert_allclose(link_s, result.breakdown.link_s * trace.num_tokens)
    assert result.outcomes.sum() == (trace.experts >= 0).sum()


@given(seed=st.integers(0, 100), split=st.sampled_from([0.0, 0.4, 1.0]), slots=st.integers(0, 8))
@settings(max_examples=20, deadline=None)
def test_without_prefetch_a_slower_link_is_never_faster(seed: int, split: float, slots: int) -> None:
    trace, costs = random_routing(10, seed), replace(COSTS, layers=COSTS.layers[:1] * NUM_LAYERS)
    speeds = [1e3, 4e3, 2e4, 1e9]
    tokens_s = [
        simulate(trace, plan(split, slots), replace(costs, link_bytes_per_s=speed), LAYERS).token_s for speed in speeds
    ]
    for slower, faster in pairwise(tokens_s):
        assert (slower >= faster - 1e-9).all()


def test_refuses_what_does_not_belong_together() -> None:
    trace = random_routing(4, seed=0)
    with pytest.raises(AssertionError, match="4 tokens of warm-up, 4 tokens"):
        simulate(trace, plan(0.4, 1), FAR_APART, LAYERS, warm_up=4)
    with pytest.raises(AssertionError):
        simulate(trace, plan(0.4, 1), COSTS, LAYERS)
    with pytest.raises(AssertionError):
        simulate(trace, plan(0.4, 1), FAR_APART, LAYERS[:2])
