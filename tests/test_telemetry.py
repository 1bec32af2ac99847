"""telemetry.py: replies, rings, threads and frozen answers; test_metrics.py recomputes the figures themselves."""

import dataclasses
import sys
import threading

import numpy as np
import pytest

from moepic_core.spec import LayerPlan, MemoryPlan, Plan
from moepic_core.telemetry import EventKind, Outcome, Part, Telemetry

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 7, 2
HIT, PARTIAL, MISS = Outcome.HIT, Outcome.PARTIAL, Outcome.MISS


def make_telemetry(**capacities):
    return Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K, **capacities)


def test_nothing_known_before_the_first_reply():
    snapshot = make_telemetry().snapshot()
    assert (snapshot.phase, snapshot.reply, snapshot.plan, snapshot.residency) == ("loading", None, None, None)
    total = snapshot.session.both.total
    assert (total.hit_rate, total.miss_rate, total.overlap, total.prefetch_accuracy) == (None, None, None, None)


def test_figures_of_a_reply_appear_as_soon_as_they_are_known():
    telemetry = make_telemetry()
    telemetry.begin_reply(1.0, prompt_tokens=5, cached_prompt_tokens=1)
    reply = telemetry.snapshot().reply
    assert (reply.prefill_progress, reply.ttft_s, reply.tpot_s, reply.tokens_per_s) == (0.0, None, None, None)
    telemetry.read_prompt(1)
    assert telemetry.snapshot().reply.prefill_progress == 0.25
    telemetry.new_token(4, 3.0)
    reply = telemetry.snapshot().reply
    assert (reply.ttft_s, reply.decode_s, reply.tpot_s, reply.tokens_per_s) == (2.0, 0.0, None, None)
    assert telemetry.snapshot().phase == "decode"


def test_a_stopped_reply_and_late_transfers():
    """What arrives after the end still belongs to the reply that asked for it, until the next one begins."""
    telemetry = make_telemetry()
    telemetry.begin_reply(0.0, 3, 0)
    telemetry.end_reply()
    telemetry.event(EventKind.DEMAND, 0, 1, Part.WHOLE, 0.0, 0.5, 64, 0)
    assert telemetry.snapshot().last_reply.prefill.total.demand_bytes == 64
    telemetry.begin_reply(1.0, 3, 0)
    snapshot = telemetry.snapshot()
    assert (snapshot.last_reply.both.total.demand_bytes, snapshot.session.both.total.demand_bytes) == (0, 64)


def test_events_in_instalments():
    telemetry = make_telemetry(event_capacity=4)
    for token in range(3):
        telemetry.event(EventKind.COMPUTE, 0, 0, Part.WHOLE, 0.0, 0.0, 0, token)
    rows, lost = telemetry.events()
    assert (rows["token"].tolist(), lost) == ([0, 1, 2], 0)
    for token in range(3, 9):
        telemetry.event(EventKind.COMPUTE, 0, 0, Part.WHOLE, 0.0, 0.0, 0, token)
    rows, lost = telemetry.events(since=3)
    assert (rows["token"].tolist(), lost) == ([5, 6, 7, 8], 2)
    assert len(telemetry.events(since=9)[0]) == 0
    assert (telemetry.trace().lost_events, len(telemetry.trace().events)) == (5, 4)


def test_a_prefill_pass_takes_padded_rows():
    telemetry = make_telemetry(routing_capacity=2)
    telemetry.begin_reply(0.0, 9, 0)
    telemetry.layer_step(1, 5, [4, 0, 6], [HIT, MISS, PARTIAL], [2, 9, 3])
    rows = telemetry.trace().routing
    assert rows["experts"].tolist() == [[4, 0], [6, 0]]
    assert rows["outcomes"].tolist() == [[2, 0], [1, 0]]
    assert rows["counts"].tolist() == [[2, 9], [3, 0]]
    assert (rows["token"] == 5).all()
    telemetry.layer_step(2, 5, [1], [HIT], [1])
    assert (telemetry.trace().lost_routing, telemetry.trace().routing["layer"].tolist()) == (1, [1, 2])
    assert telemetry.snapshot().session.prefill.total.uses == 15  # the counters lose nothing


@pytest.fixture
def busy_threads():
    """Threads take turns every few microseconds, so that a missing lock shows."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_threads_lose_nothing_and_readers_see_whole_steps(busy_threads):
    telemetry = make_telemetry(event_capacity=100)
    telemetry.begin_reply(0.0, 1, 0)
    rounds = 1500

    def compute():
        for token in range(rounds):
            telemetry.layer_step(token % NUM_LAYERS, token, [1, 2], [HIT, MISS], [1, 1])

    def move(kind):
        for number in range(rounds):
            telemetry.event(kind, number % NUM_LAYERS, 0, Part.WHOLE, number / 8, number / 8 + 1 / 16, 3, number)

    jobs = [(compute,), (move, EventKind.DEMAND), (move, EventKind.PREFETCH)]
    threads = [threading.Thread(target=job, args=args) for job, *args in jobs]
    for thread in threads:
        thread.start()
    version = 0
    while any(thread.is_alive() for thread in threads):
        snapshot = telemetry.snapshot()
        assert snapshot.version >= version
        version = snapshot.version
        total, both = snapshot.session.both.total, snapshot.session.both
        assert total.uses == both.activations.sum()
        assert total.hits == total.misses
        assert snapshot.version == 1 + total.uses // 2 + (total.demand_bytes + total.prefetch_bytes) // 3
    total = telemetry.snapshot().session.both.total
    assert (total.uses, total.demand_bytes, total.prefetch_bytes) == (2 * rounds, 3 * rounds, 3 * rounds)
    assert total.link_busy_s == rounds / 16  # both kinds at the same times: each instant counts once
    assert telemetry.trace().lost_events == 2 * rounds - 100
    telemetry.check()


def test_snapshots_are_frozen():
    telemetry = make_telemetry()
    telemetry.layer_step(0, 50, [1, 2], [HIT, HIT], [1, 1])
    where = np.zeros((NUM_LAYERS, NUM_EXPERTS), np.uint8)
    snapshot = telemetry.snapshot(where)
    where[0, 0] = 2
    telemetry.layer_step(0, 50, [1, 2], [HIT, HIT], [1, 1])
    assert snapshot.residency[0, 0] == 0
    assert snapshot.session.both.total.uses == 2
    for array in (snapshot.residency, snapshot.session.decode.counts, snapshot.session.both.activations):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.version = 0


def test_plan_and_memory_are_told():
    telemetry = make_telemetry()
    layers = tuple(LayerPlan(slots=layer, top_rows=4, split_ratio=0.5) for layer in range(NUM_LAYERS))
    memory = MemoryPlan(resident=5, kv=1, workspace=1, staging=1, cache=2, budget=10)
    plan = Plan(layers, 4, "lcp", "next-router", 2, "fetch", memory, "moepic", "test")
    told = {"resident": 5, "cache": 2}
    version = telemetry.version
    telemetry.set_plan(plan, told)
    told["cache"] = 99
    snapshot = telemetry.snapshot()
    assert (snapshot.plan, dict(snapshot.memory_bytes)) == (plan, {"resident": 5, "cache": 2})
    assert telemetry.version == version + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.layer_step(NUM_LAYERS, 0, [1, 2], [0, 0], [1, 1]), "layer 3 of 3"),
        (lambda t: t.layer_step(0, 0, [1, 2], [0], [1, 1]), r"\[1, 2\] with \[0\]"),
        (lambda t: t.event(EventKind.STALL, -1, 0, 0, 0.0, 1.0, 0, 0), "layer -1 of 3"),
        (lambda t: t.event(EventKind.STALL, 0, 0, 0, 2.0, 1.0, 0, 0), "ends at 1.0 s, before it starts at 2.0 s"),
        (lambda t: t.new_token(0, 1.0), "phase is loading, wanted prefill or decode"),
        (lambda t: t.events(since=1), "row 1 of 0"),
    ],
)
def test_wrong_calls_are_mistakes_of_ours(call, message):
    with pytest.raises(AssertionError, match=message):
        call(make_telemetry())


def test_check_names_both_sides():
    telemetry = make_telemetry()
    telemetry._counts[0][1][2] += 1
    with pytest.raises(AssertionError, match=r"uses \[0, 1, 0\], activations \[0, 0, 0\]"):
        telemetry.check()
