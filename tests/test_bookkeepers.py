"""Slots and staging buffers on their own, in any order of calls: books that balance, bytes that stay where they belong.

The residency's machine (`test_residency`) drives both as serving does; here are also orders that serving never takes.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from null_transfer import POISON, NullTransfer

from moepic_core.arena import Arena
from moepic_core.device_cache import LayerCache, Slot, SlotState
from moepic_core.errors import OutOfRoom
from moepic_core.geometry import record_stride
from moepic_core.packing import aligned_bytes
from moepic_core.spec import MoeLayer
from moepic_core.staging import Staging, StagingBuffer
from moepic_core.transfer.base import Fence, MemorySource, Priority

LAYER = MoeLayer(0, num_experts=6, neurons=40, hidden=32, matrices=3, itemsize=4)  # a record of four alignment units
ROWS = (0, 7, 20, 40)  # of a top
EXPERTS = st.integers(0, LAYER.num_experts - 1)


def record(expert: int, nbytes: int) -> torch.Tensor:
    """What `expert` looks like: no byte is that of another expert, none is the transfer's poison."""
    return (torch.arange(nbytes) % 30 + 40 * expert).to(torch.uint8)


class Slots(RuleBasedStateMachine):
    @initialize(room=st.integers(0, 8), num_slots=st.integers(0, 6), rows=st.sampled_from(ROWS))
    def start(self, room: int, num_slots: int, rows: int) -> None:
        self.arena = Arena(torch.device("cpu"), room * record_stride(LAYER))
        self.cache = LayerCache(LAYER, torch.float32, self.arena)
        self.state: dict[int, SlotState] = {}  # of the experts that have a slot
        self.resize(num_slots, rows, list(range(LAYER.num_experts)))

    def slot(self, expert: int, state: SlotState) -> Slot | None:
        """The expert's slot if it is in `state`."""
        return self.cache.find(expert) if self.state.get(expert) is state else None

    @rule(expert=EXPERTS)
    def claim(self, expert: int) -> None:
        slot = self.cache.free_slot()
        assert (slot is None) == (len(self.state) == len(self.cache.slots))
        if slot is not None and expert not in self.state:
            slot.buffer.fill_(POISON)
            self.cache.claim(slot, expert)
            self.state[expert] = SlotState.ARRIVING

    @rule(expert=EXPERTS, in_its_buffer=st.booleans())
    def arrive(self, expert: int, in_its_buffer: bool) -> None:
        slot = self.slot(expert, SlotState.ARRIVING)
        if slot is None:
            return
        nbytes = slot.buffer.numel()
        if in_its_buffer and self.arena.used_bytes + nbytes <= self.arena.budget_bytes:
            arrived, before = self.arena.allocate("staging", nbytes), slot.buffer
            arrived.copy_(record(expert, nbytes))
            given = self.cache.exchange(slot, arrived)
            assert given is before
            self.arena.free("staging", given)
        else:
            slot.buffer.copy_(record(expert, nbytes))
        self.cache.arrived(slot)
        self.state[expert] = SlotState.IN_USE

    @rule(expert=EXPERTS)
    def use(self, expert: int) -> None:
        slot = self.slot(expert, SlotState.READY)
        if slot is not None:
            self.cache.use(slot)
            self.state[expert] = SlotState.IN_USE

    @rule(expert=EXPERTS)
    def release(self, expert: int) -> None:
        slot, fence = self.slot(expert, SlotState.IN_USE), Fence()
        if slot is not None:
            self.cache.release(slot, fence)
            assert slot.fence is fence
            self.state[expert] = SlotState.READY

    @rule(expert=EXPERTS, in_its_buffer=st.booleans())
    def bring(self, expert: int, in_its_buffer: bool) -> None:
        """One after the other, so that caches fill up."""
        self.claim(expert)
        self.arrive(expert, in_its_buffer)
        self.release(expert)

    @rule(expert=EXPERTS)
    def forget(self, expert: int) -> None:
        slot = self.slot(expert, SlotState.READY) or self.slot(expert, SlotState.ARRIVING)
        if slot is not None:
            self.cache.forget(slot)
            del self.state[expert]

    @precondition(lambda self: all(state is SlotState.READY for state in self.state.values()))
    @rule(num_slots=st.integers(0, 6), rows=st.sampled_from(ROWS), ranking=st.permutations(range(LAYER.num_experts)))
    def resize(self, num_slots: int, rows: int, ranking: list[int]) -> None:
        """Survivors are the best of `ranking`, all of them unless a copy to a smaller slot found no room."""
        before = self.cache.top_rows
        best = [expert for expert in ranking if expert in self.state][:num_slots]
        self.cache.shrink(num_slots, rows, ranking)
        kept = set(self.cache.expert_to_slot)
        assert kept <= set(best)
        assert kept == (set(best) if rows == before else set()) or 0 < rows < before
        assert len(self.cache.slots) <= num_slots
        self.state = dict.fromkeys(kept, SlotState.READY)
        try:
            self.cache.grow(num_slots)
            assert len(self.cache.slots) == (num_slots if rows else 0)
        except OutOfRoom:
            assert self.cache.top is not None
            assert self.arena.used_bytes + self.cache.top.stop > self.arena.budget_bytes

    @invariant()
    def balanced(self) -> None:
        self.cache.check()
        self.arena.check()
        buffers = [slot.buffer for slot in self.cache.slots]
        assert self.arena.used_bytes == self.arena.bytes_by_kind["cache"] == sum(map(torch.numel, buffers))
        assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)
        assert {expert: slot.state for expert, slot in self.cache.expert_to_slot.items()} == self.state
        ready = {expert for expert, state in self.state.items() if state is SlotState.READY}
        assert set(self.cache.evictable({0, 1})) == ready - {0, 1}

    @invariant()
    def every_expert_is_itself(self) -> None:
        for expert, slot in self.cache.expert_to_slot.items():
            if slot.state is not SlotState.ARRIVING:
                rows = slot.weights.reshape(-1).view(torch.uint8)
                assert torch.equal(rows, record(expert, rows.numel())), expert
                assert rows.numel() == self.cache.top_rows * LAYER.row_bytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.arena.used_bytes == 0


class Buffers(RuleBasedStateMachine):
    """Every buffer that is taken has a transfer on its way; NullTransfer refuses one before the last has settled."""

    @initialize(number=st.integers(0, 4), seed=st.none() | st.integers(0, 3))
    def start(self, number: int, seed: int | None) -> None:
        self.transfer = NullTransfer(seed)
        self.arena = Arena(torch.device("cpu"), 5 * record_stride(LAYER))
        self.staging = Staging(self.arena)
        self.demands: list[StagingBuffer] = []
        self.guesses: list[StagingBuffer] = []
        self.number = 0
        self.resize(number, 4)

    def send(self, buffer: StagingBuffer, priority: Priority) -> None:
        nbytes = buffer.buffer.numel()
        source = aligned_bytes(nbytes)
        source.copy_(record(buffer.expert, nbytes))
        buffer.top = self.transfer.submit(
            MemorySource(source), buffer.buffer, priority, tag=(buffer.expert, id(buffer))
        )

    @rule(layer=st.integers(0, 1), expert=EXPERTS)
    def take_demand(self, layer: int, expert: int) -> None:
        free = len(self.staging.free)
        buffer = self.staging.take_demand(layer, expert)
        assert (buffer is None) == (free == 0)
        if buffer is not None:
            assert (buffer.layer, buffer.expert, buffer.guess, buffer.tickets()) == (layer, expert, False, [])
            self.demands.append(buffer)
            self.send(buffer, Priority.DEMAND)

    @rule(layer=st.integers(0, 1), expert=EXPERTS)
    def take_guess(self, layer: int, expert: int) -> None:
        if self.staging.find_guess(layer, expert) is not None:
            return
        free = len(self.staging.free)
        buffer = self.staging.take_guess(layer, expert)
        assert (buffer is None) == (free == 0)
        assert self.staging.find_guess(layer, expert) is buffer
        if buffer is not None:
            self.guesses.append(buffer)
            self.send(buffer, Priority.PREFETCH)

    @precondition(lambda self: self.guesses)
    @rule(place=st.integers(0, 9))
    def guess_came_true(self, place: int) -> None:
        buffer = self.guesses.pop(place % len(self.guesses))
        self.staging.guess_came_true(buffer)
        self.demands.append(buffer)

    @precondition(lambda self: self.demands)
    @rule(place=st.integers(0, 9))
    def compute(self, place: int) -> None:
        """A demand arrives, is right, and its buffer is free."""
        buffer, fence = self.demands.pop(place % len(self.demands)), Fence()
        (ticket,) = buffer.tickets()
        ticket.wait()
        assert torch.equal(buffer.buffer, record(buffer.expert, buffer.buffer.numel()))
        self.staging.give_back(buffer, fence)
        assert buffer.fence is fence

    @precondition(lambda self: self.demands or self.guesses)
    @rule(place=st.integers(0, 9))
    def cancel(self, place: int) -> None:
        kind = self.guesses if (place % 2 and self.guesses) or not self.demands else self.demands
        buffer = kind.pop(place % len(kind))
        for ticket in buffer.tickets():
            self.transfer.cancel(ticket)
        self.staging.give_back(buffer, None)

    @rule(count=st.integers(1, 5))
    def move(self, count: int) -> None:
        self.transfer.step(count)

    @rule()
    def begin_a_chunk(self) -> None:
        self.transfer.begin()

    @rule()
    def end_a_chunk(self) -> None:
        if self.transfer.in_flight:
            self.transfer.end(self.transfer.in_flight[0])

    @precondition(lambda self: not self.demands and not self.guesses)
    @rule(number=st.integers(0, 5), units=st.integers(3, 4))
    def resize(self, number: int, units: int) -> None:
        self.number = number
        self.staging.resize(number, units * 4096)
        assert all(buffer.buffer.numel() == units * 4096 for buffer in self.staging.free)

    @invariant()
    def balanced(self) -> None:
        self.staging.check()
        self.arena.check()
        self.transfer.check()
        taken = [*self.staging.demands, *self.staging.guesses.values()]
        assert self.staging.demands == set(self.demands)
        assert list(self.staging.guesses.values()) == self.guesses  # the oldest first
        assert self.staging.num_buffers == self.number == len(taken) + len(self.staging.free)
        held = sum(buffer.buffer.numel() for buffer in (*taken, *self.staging.free))
        assert self.arena.used_bytes == self.arena.bytes_by_kind["staging"] == held

    def teardown(self) -> None:
        if hasattr(self, "staging"):
            while self.demands or self.guesses:
                self.cancel(0)
            self.resize(0, 4)
            assert self.arena.used_bytes == 0
            self.transfer.close()


TestSlots = Slots.TestCase
TestBuffers = Buffers.TestCase
TestSlots.settings = TestBuffers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
