"""The residency over a transfer that delays, reorders and poisons: right answers, balanced books, nothing left
behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from null_transfer import NullTransfer
from rig import NUM_EXPERTS, NUM_LAYERS, Rig, inputs

from moepic_core.errors import Cancelled, TransferFailed
from moepic_core.pieces import Piece
from moepic_core.step import Step
from moepic_core.trace import EventKind, Outcome, Part


def passes(rig: Rig, seed: int, sizes: tuple[int, ...] = (5, 1, 1, 1, 4, 1, 1)) -> torch.Tensor:
    """Several forward passes through all layers, half of the guesses right; all outputs, one below the other."""
    outputs = []
    for number, tokens in enumerate(sizes):
        rig.residency.begin_pass(tokens)
        for layer in range(NUM_LAYERS):
            x, routes, weights = inputs(tokens, seed + 100 * number + layer)
            next_routes = inputs(tokens, seed + 100 * number + layer + 1)[1]
            guesses = list(dict.fromkeys([int(next_routes[0, 0]), (int(next_routes[0, 1]) + 1) % NUM_EXPERTS]))
            out = rig.run(layer, x, routes, weights, guesses)
            torch.testing.assert_close(out, rig.reference(layer, x, routes, weights), rtol=1e-5, atol=1e-4)
            outputs.append(out)
            rig.residency.check()
            rig.arena.check()
        rig.residency.end_pass()
    rig.telemetry.check()
    return torch.cat(outputs)


@pytest.mark.parametrize("split", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("room", [0, 3, 7, 24])
@pytest.mark.parametrize("neurons", [40, 7], ids=["two alignment units", "one"])
def test_outputs_are_right_for_every_split_and_size(split: float, room: int, neurons: int) -> None:
    rig = Rig(room_records=room, split=split, neurons=neurons)
    passes(rig, seed=3)
    rig.residency.close()
    assert rig.arena.used_bytes == 0


@pytest.mark.parametrize("split", [0.0, 0.3, 1.0])
def test_outputs_are_bit_identical_for_any_arrival_order_cache_size_and_policy(split: float) -> None:
    first = passes(Rig(split=split), seed=5)
    for order in range(4):
        for room in (0, 2, 5):
            rig = Rig(NullTransfer(seed=order), room_records=room, split=split)
            assert torch.equal(passes(rig, seed=5), first), (order, room)
    for eviction in ("lru", "lfu"):
        rig = Rig(room_records=4, split=split)
        rig.residency.apply(rig.plan(4, split, eviction=eviction))
        assert torch.equal(passes(rig, seed=5), first), eviction


def test_outcomes_of_hand_made_steps() -> None:
    rig = Rig(room_records=100, split=0.4)
    x, _, weights = inputs(1, 0)
    routes = torch.tensor([[2, 5]])
    rig.residency.begin_pass(1)
    rig.run(0, x, routes, weights)
    rig.run(0, x, routes, weights)
    rig.run(1, x, routes, weights, guesses=[1, 2])
    rig.transfer.step(100)  # the guesses arrive before their layer runs
    rig.run(2, x, torch.tensor([[1, 6]]), weights)
    trace = rig.telemetry.trace().routing
    assert trace["outcomes"].tolist() == [
        [Outcome.MISS, Outcome.MISS],
        [Outcome.PARTIAL, Outcome.PARTIAL],
        [Outcome.MISS, Outcome.MISS],
        [Outcome.HIT, Outcome.MISS],
    ]
    events = rig.telemetry.trace().events
    assert [row["expert"] for row in events if row["kind"] == EventKind.USED] == [1]
    assert [row["expert"] for row in events if row["kind"] == EventKind.WASTED] == [2]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_layer_that_lacks_nothing_is_computed_from_its_slots(stop_after: int) -> None:
    """Every need a hit, one computation each; whatever ends the step early, the slots are ready for the next."""
    rig = Rig(split=1.0)
    x, routes, weights = inputs(1, 7)
    for _ in range(2):
        rig.residency.begin_pass(1)
        out = rig.run(0, x, routes, weights)
    torch.testing.assert_close(out, rig.reference(0, x, routes, weights), rtol=1e-5, atol=1e-4)
    trace = rig.telemetry.trace()
    assert trace.routing["outcomes"].tolist() == [[Outcome.MISS] * 2, [Outcome.HIT] * 2]
    computed = trace.events[trace.events["kind"] == EventKind.COMPUTE][-2:]
    assert sorted(computed["expert"].tolist()) == sorted(routes[0].tolist())
    assert (computed["part"] == Part.WHOLE).all()
    assert computed["end_s"][0] == computed["start_s"][1]
    with suppress(KeyError), Step(rig.residency, 0, dict.fromkeys(routes[0].tolist(), 1)) as step:
        for number, _ in enumerate(step, start=1):
            if number == stop_after:
                raise KeyError
    rig.residency.check()
    assert torch.equal(rig.run(0, x, routes, weights), out)
    rig.residency.close()


def test_a_partial_hit_moves_only_the_bottom() -> None:
    rig = Rig(room_records=100, split=0.5, neurons=64)  # 64 rows of 384 bytes: the cut falls on an alignment unit
    x, routes, weights = inputs(1, 0)
    rig.residency.begin_pass(1)
    rig.run(0, x, routes, weights)
    before = rig.transfer.counters().demand_bytes
    assert before == 2 * rig.record_bytes
    rig.run(0, x, routes, weights)
    assert rig.transfer.counters().demand_bytes - before == rig.record_bytes


@pytest.mark.parametrize(("split", "copies"), [(1.0, 0), (0.4, 1)])
def test_a_guess_that_came_true_moves_into_a_slot(split: float, copies: int) -> None:
    """A whole expert with its buffer, a top by a copy; either way it is found there by the next token."""
    rig = Rig(room_records=6, split=split)
    x, _, weights = inputs(1, 0)
    routes = torch.tensor([[3, 4]])
    rig.residency.begin_pass(1)
    rig.run(0, x, routes, weights, guesses=[3])
    guess = rig.residency.staging.find_guess(1, 3)
    assert guess is not None
    travelled_into, used_bytes = guess.buffer, rig.arena.used_bytes
    first = rig.run(1, x, routes, weights)
    slot = rig.residency.caches[1].find(3)
    assert slot is not None
    assert (slot.buffer is travelled_into) == (not copies)
    assert not any(free.buffer is slot.buffer for free in rig.residency.staging.free)
    before = rig.transfer.counters().demand_bytes
    assert torch.equal(rig.run(1, x, routes, weights), first)
    assert (rig.transfer.counters().demand_bytes == before) == (not copies)  # a cached top still lacks its bottom
    assert rig.arena.used_bytes == used_bytes
    events, _ = rig.telemetry.events()
    assert (events["kind"] == EventKind.ADMIT).sum() == copies
    rig.residency.check()
    rig.residency.close()
    assert rig.arena.used_bytes == 0


def test_a_demand_takes_the_newest_guess_away_when_staging_is_full() -> None:
    rig = Rig(room_records=0, split=0.0)
    x, _, weights = inputs(1, 0)
    rig.residency.begin_pass(1)
    rig.run(0, x, torch.tensor([[0, 1]]), weights, guesses=[0, 1])
    rig.residency.prefetch(2, [3, 4])  # guesses for layer 1 and 2 now hold all four buffers
    assert len(rig.residency.staging.guesses) == 4
    out = rig.run(1, x, torch.tensor([[0, 7]]), weights)
    torch.testing.assert_close(out, rig.reference(1, x, torch.tensor([[0, 7]]), weights), rtol=1e-5, atol=1e-4)
    assert list(rig.residency.staging.guesses) == [(2, 3), (2, 4)]  # the wrong guess of its own layer went first
    rig.residency.check()


def test_decode_always_admits_and_a_prompt_keeps_the_better() -> None:
    rig = Rig(room_records=3, split=1.0)  # one slot per layer
    weights = inputs(1, 0)[2]
    rig.residency.begin_pass(1)
    rig.run(0, inputs(1, 0)[0], torch.tensor([[0, 1]]), weights)
    assert set(rig.residency.caches[0].expert_to_slot) == {0}
    rig.run(0, inputs(1, 0)[0], torch.tensor([[3, 4]]), weights)
    assert set(rig.residency.caches[0].expert_to_slot) == {3}
    rig.residency.begin_pass(4)
    x, _, weights = inputs(4, 1)
    rig.run(0, x, torch.tensor([[5, 6], [5, 6], [5, 7], [5, 1]]), weights)
    assert set(rig.residency.caches[0].expert_to_slot) == {5}
    rig.run(0, x, torch.tensor([[5, 2], [5, 2], [5, 2], [5, 0]]), weights)
    assert set(rig.residency.caches[0].expert_to_slot) == {5}  # 2 was wanted often, 5 more


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
def test_a_transfer_that_fails_once_is_not_noticed(split: float) -> None:
    transfer = NullTransfer()
    rig = Rig(transfer, room_records=2, split=split)
    for expert in range(NUM_EXPERTS):
        for part in Part:
            transfer.failures[0, expert, part] = 1
    passes(rig, seed=2)
    assert transfer.counters().retried > 0
    assert transfer.counters().failed == 0


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_transfer_that_always_fails_ends_the_step_and_leaves_everything_usable(split: float, tokens: int) -> None:
    transfer = NullTransfer()
    rig = Rig(transfer, room_records=2, split=split)
    x, routes, weights = inputs(tokens, 0)
    for part in Part:
        transfer.failures[0, int(routes[0, 1]), part] = 1e9
    rig.residency.begin_pass(tokens)
    with pytest.raises(TransferFailed):
        rig.run(0, x, routes, weights)
    rig.residency.check()
    assert not rig.residency.staging.demands
    transfer.failures.clear()
    torch.testing.assert_close(
        rig.run(0, x, routes, weights), rig.reference(0, x, routes, weights), rtol=1e-5, atol=1e-4
    )


def test_a_stop_while_warming_up_leaves_nothing_half_arrived() -> None:
    rig = Rig(room_records=2)
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            rig.residency.policies[layer].touch(expert, 0)
    rig.stopped = True
    with pytest.raises(Cancelled):
        rig.residency.warm_up()
    rig.residency.check()
    assert not any(map(any, rig.residency.where()))
    rig.stopped = False
    rig.residency.warm_up()
    rig.residency.check()
    assert any(map(any, rig.residency.where()))


def stopped_pieces(rig: Rig, step: Step) -> Iterator[Piece]:
    """The pieces of a step during which the user stops."""
    with step:
        rig.stopped = True
        yield from step


def test_a_stop_while_waiting_cancels_and_cleans_up() -> None:
    rig = Rig(room_records=2)
    x, routes, weights = inputs(1, 0)
    rig.residency.begin_pass(1)
    step = Step(rig.residency, 0, {int(expert): 1 for expert in routes[0]})
    with pytest.raises(Cancelled):
        list(stopped_pieces(rig, step))
    rig.residency.check()
    assert not rig.residency.staging.demands
    assert rig.transfer.counters().cancelled > 0
    with pytest.raises(Cancelled), Step(rig.residency, 0, {0: 1}):
        pass
    rig.stopped = False
    rig.run(0, x, routes, weights)


def test_two_hundred_changes_of_plan_lose_no_byte() -> None:
    rig = Rig(room_records=6)
    for number in range(200):
        room, split = (0, 3, 9, 24)[number % 4], (0.0, 0.3, 0.4, 0.7, 1.0)[number % 5]
        plan = rig.plan(room, split)
        rig.residency.apply(plan)
        assert rig.arena.bytes_by_kind["cache"] == plan.memory.cache, number
        assert rig.arena.bytes_by_kind["staging"] == plan.memory.staging, number
        passes(rig, seed=number, sizes=(1, 3)) if number % 20 == 0 else None
        rig.residency.check()
        rig.arena.check()
    rig.residency.close()
    assert rig.arena.used_bytes == 0


def test_a_smaller_top_is_kept_on_the_device_and_stays_right() -> None:
    rig = Rig(room_records=24, split=1.0)
    passes(rig, seed=1)
    cached = set(rig.residency.caches[0].expert_to_slot)
    assert cached
    rig.residency.apply(rig.plan(12, 0.4))
    kept = set(rig.residency.caches[0].expert_to_slot)
    assert kept < cached
    assert len(kept) == len(cached) - 1  # the budget was full: one top had to go to make room for the first copy
    passes(rig, seed=1)


class Books(RuleBasedStateMachine):
    """Any order of steps, guesses, stops, failures and changes of plan keeps the books balanced and the answers
    right.
    """

    @initialize(seed=st.integers(0, 3), room=st.integers(0, 12), split=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    def start(self, seed: int, room: int, split: float) -> None:
        self.transfer = NullTransfer(seed=seed)
        self.rig = Rig(self.transfer, room_records=room, split=split)
        self.number = 0

    @rule(
        tokens=st.sampled_from([1, 1, 1, 5]), layer=st.integers(0, NUM_LAYERS - 1), seed=st.integers(0, 50),
        guesses=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, max_size=4),
    )  # fmt: skip
    def run(self, tokens: int, layer: int, seed: int, guesses: list[int]) -> None:
        x, routes, weights = inputs(tokens, seed)
        self.rig.residency.begin_pass(tokens)
        out = self.rig.run(layer, x, routes, weights, guesses)
        torch.testing.assert_close(out, self.rig.reference(layer, x, routes, weights), rtol=1e-5, atol=1e-4)

    @rule(tokens=st.sampled_from([1, 4]), layer=st.integers(0, NUM_LAYERS - 1), seed=st.integers(0, 50))
    def fail(self, tokens: int, layer: int, seed: int) -> None:
        x, routes, weights = inputs(tokens, seed)
        self.transfer.failures = {(layer, int(routes[0, 0]), part): 1e9 for part in Part}
        self.rig.residency.begin_pass(tokens)
        try:
            self.rig.run(layer, x, routes, weights)
        except TransferFailed:
            self.rig.residency.forget_guesses()
        self.transfer.failures = {}

    @rule(tokens=st.sampled_from([1, 4]), layer=st.integers(0, NUM_LAYERS - 1), pieces=st.integers(0, 3))
    def stop_after(self, tokens: int, layer: int, pieces: int) -> None:
        _, routes, _ = inputs(tokens, pieces)
        self.rig.residency.begin_pass(tokens)
        counts = {int(expert): 1 for expert in routes.unique()}
        try:
            with Step(self.rig.residency, layer, counts) as step:
                for number, _ in enumerate(step):
                    self.rig.stopped = number == pieces
                    if self.rig.stopped:
                        raise Cancelled("by the test")
        except Cancelled:
            pass
        self.rig.stopped = False

    @rule(
        room=st.integers(0, 12),
        split=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        eviction=st.sampled_from(["lcp", "lru", "lfu"]),
    )
    def change_plan(self, room: int, split: float, eviction: str) -> None:
        self.rig.residency.apply(self.rig.plan(room, split, eviction=eviction))

    @rule(count=st.integers(1, 9))
    def let_arrive(self, count: int) -> None:
        self.transfer.step(count)

    @rule()
    def forget_guesses(self) -> None:
        self.rig.residency.forget_guesses()

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "rig"):
            self.rig.residency.check()
            self.rig.arena.check()
            self.rig.telemetry.check()
            residency, held = self.rig.residency, self.rig.arena.bytes_by_kind
            staging = residency.staging
            assert not staging.demands
            slots = [slot.buffer for cache in residency.caches for slot in cache.slots]
            buffers = [each.buffer for each in (*staging.free, *staging.guesses.values())]
            assert held["cache"] == sum(slot.numel() for slot in slots)
            assert held["staging"] == sum(buffer.numel() for buffer in buffers)
            addresses = {buffer.data_ptr() for buffer in (*slots, *buffers)}
            assert len(addresses) == len(slots) + len(buffers)  # nothing is held twice

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.residency.close()
            assert self.rig.arena.used_bytes == 0


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(12))
def test_wishes_for_a_layer_end_when_it_runs(seed: int) -> None:
    """A small cache in the first layer only: the others want no guesses, so no newer wishes replace the first's."""
    rig = Rig(room_records=100, split=0.4)
    rig.residency.apply(rig.plan(100, 0.4))
    whole, plan = rig.residency.plan, rig.plan(100, 1.0)
    assert whole is not None
    layers = (replace(whole.layers[0], slots=3), *plan.layers[1:])
    rig.residency.apply(replace(plan, layers=layers, staging_records=3, predictor="next-router", prefetch_depth=2))
    for number, tokens in enumerate((5, 1, 6, 1, 1, 7, 1, 5)):
        rig.residency.begin_pass(tokens)
        for layer in range(NUM_LAYERS):
            x, routes, weights = inputs(tokens, 1000 * seed + 100 * number + layer)
            wanted = rig.residency.wants_guesses((layer + 1) % NUM_LAYERS)
            guesses = list(range(NUM_EXPERTS)) if wanted else []
            out = rig.run(layer, x, routes, weights, guesses)
            torch.testing.assert_close(out, rig.reference(layer, x, routes, weights), rtol=1e-5, atol=1e-3)
            rig.residency.check()
            assert not any(layer == guessed for guessed, _ in rig.residency.wishes)
        rig.residency.end_pass()
