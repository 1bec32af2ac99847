"""The books of a transfer backend: exact on synthetic schedules, and never wrong under any sequence of calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from null_transfer import NullTransfer
from transfer_links import data_of

from moepic_core.errors import Cancelled, TransferFailed
from moepic_core.transfer import clocks
from moepic_core.transfer.base import MemorySource, Priority, Transfer
from moepic_core.transfer.clocks import BusyTime
from moepic_core.transfer.emulated import EmulatedTransfer
from moepic_core.transfer.ledger import Entry, Ledger, Outcome
from moepic_core.transfer.thread import ThreadTransfer

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # no thread dies
DEMAND, PREFETCH = Priority.DEMAND, Priority.PREFETCH
CHUNK_BYTES = 4096


def entry(num_chunks: float, priority: Priority, tag: object = None) -> Entry:
    memory = torch.zeros(int(num_chunks * CHUNK_BYTES), dtype=torch.uint8)
    return Entry(MemorySource(memory), memory, priority, tag, 0.0)


def taken_tags(ledger: Ledger[Entry]) -> list[object]:
    tags = []
    while (chunk := ledger.take()) is not None:
        tags.append(chunk.entry.tag)
        ledger.check()
    return tags


def test_order_of_service() -> None:
    ledger: Ledger[Entry] = Ledger(CHUNK_BYTES)
    entries = {
        tag: entry(num_chunks, priority, tag)
        for tag, num_chunks, priority in (
            ("guess", 2, PREFETCH),
            ("late guess", 2, PREFETCH),
            ("need", 1.5, DEMAND),
            ("late need", 1, DEMAND),
            ("dropped", 3, DEMAND),
        )
    }
    for each in entries.values():
        ledger.admit(each)
    assert ledger.peek() is entries["need"]
    ledger.promote(entries["late guess"])
    assert ledger.drop(entries["dropped"], Cancelled("no"))
    assert not ledger.drop(entries["dropped"], Cancelled("again"))
    assert taken_tags(ledger) == ["need", "need", "late need", "late guess", "late guess", "guess", "guess"]


def test_one_ticket_in_numbers() -> None:
    ledger: Ledger[Entry] = Ledger(CHUNK_BYTES)
    ticket = entry(2.5, PREFETCH, "x")
    ledger.admit(ticket)
    first = ledger.take()
    assert first is not None
    assert (first.offset, first.nbytes, first.priority) == (0, 4096, PREFETCH)
    ledger.promote(ticket)
    rest = ledger.take(ticket, limit_bytes=ticket.nbytes)
    assert rest is not None
    assert (rest.offset, rest.nbytes, rest.priority) == (4096, 6144, DEMAND)
    assert ledger.take() is None
    ledger.finish(rest, 2.0, 5.0)
    assert not ticket.ended
    ledger.finish(first, 1.0, 3.0)
    assert (ticket.outcome, ticket.at_rest, ledger.num_live) == (Outcome.SUCCEEDED, True, 0)
    counters = ledger.counters()
    assert (counters.demand_bytes, counters.prefetch_bytes, counters.busy_s) == (6144, 4096, 4.0)
    assert [
        (event.tag, event.priority, event.start_s, event.end_s, event.nbytes) for event in ledger.drain_events()
    ] == [
        ("x", DEMAND, 2.0, 5.0, 6144),
        ("x", PREFETCH, 1.0, 3.0, 4096),
    ]
    ledger.check()


def test_a_failed_chunk_ends_the_ticket_but_the_one_in_flight_still_settles() -> None:
    ledger: Ledger[Entry] = Ledger(CHUNK_BYTES)
    ticket = entry(4, DEMAND)
    ledger.admit(ticket)
    lost, flying = ledger.take(), ledger.take()
    assert lost is not None
    assert flying is not None
    ledger.finish(lost, 0.0, 1.0, TransferFailed("broken"))
    assert (ticket.outcome, ticket.at_rest) == (Outcome.FAILED, False)
    assert ledger.take() is None
    ledger.check()
    ledger.finish(flying, 0.0, 2.0)
    assert (ticket.outcome, ticket.at_rest, ledger.num_live) == (Outcome.FAILED, True, 0)
    ledger.check()


@pytest.mark.parametrize("attribute", ["landed_bytes", "taken_bytes", "num_in_flight", "priority", "outcome"])
def test_check_notices_every_kind_of_damage(attribute: str) -> None:
    ledger: Ledger[Entry] = Ledger(CHUNK_BYTES)
    ticket = entry(3, DEMAND)
    ledger.admit(ticket)
    ledger.take()
    ledger.check()
    damaged = {"priority": PREFETCH, "outcome": Outcome.FAILED, "num_in_flight": 0}.get(attribute, 4095)
    setattr(ticket, attribute, damaged)
    with pytest.raises(AssertionError):
        ledger.check()


@pytest.mark.parametrize(
    ("intervals", "total_s"),
    [
        ([(0, 1), (2, 3)], 2),
        ([(2, 3), (0, 1), (1, 2)], 3),
        ([(0, 10), (3, 4), (6, 7)], 10),
        ([(3, 4), (6, 7), (0, 10)], 10),
        ([(0, 4), (2, 6), (5, 9), (20, 20)], 9),
    ],
)
def test_busy_time_of_known_schedules(intervals: list[tuple[float, float]], total_s: float) -> None:
    busy = BusyTime()
    for start_s, end_s in intervals:
        busy.add(start_s, end_s)
    assert busy.total_s == total_s


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15))))
def test_busy_time_is_the_number_of_covered_seconds(spans: list[tuple[int, int]]) -> None:
    busy = BusyTime()
    for start, length in spans:
        busy.add(float(start), float(start + length))
    assert busy.total_s == len({second for start, length in spans for second in range(start, start + length)})


def test_busy_time_forgets_the_distant_past_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_MAX_GAPS", 8)
    busy = BusyTime()
    for second in range(0, 200, 2):
        busy.add(float(second), second + 1.0)
    assert busy.total_s == 100
    assert len(busy._starts) <= 8
    busy.add(196.0, 200.0)
    assert busy.total_s == 102


class TransferMachine(RuleBasedStateMachine):
    """Any order of calls keeps the books right, and whatever `wait` lets through has the source's bytes."""

    num_buffers = 4

    def make(self, seed: int | None) -> Transfer:
        return NullTransfer(seed)

    @initialize(seed=st.none() | st.integers(0, 3))
    def start(self, seed: int | None) -> None:
        self.transfer = self.make(seed)
        self.buffers = [torch.zeros(5 * CHUNK_BYTES, dtype=torch.uint8) for _ in range(self.num_buffers)]
        self.tickets: dict[int, tuple[Entry, torch.Tensor]] = {}
        self.num_submitted = 0

    @rule(place=st.integers(0, 3), num_chunks=st.sampled_from([0.5, 1, 3, 4.25]), priority=st.sampled_from(Priority))
    def submit(self, place: int, num_chunks: float, priority: Priority) -> None:
        if place in self.tickets:
            return
        self.num_submitted += 1
        data = data_of(int(num_chunks * CHUNK_BYTES), self.num_submitted)
        buffer = self.buffers[place][: data.numel()]
        ticket = self.transfer.submit(MemorySource(data), buffer, priority, self.num_submitted)
        assert isinstance(ticket, Entry)
        self.tickets[place] = ticket, data

    @precondition(lambda self: self.tickets)
    @rule(choice=st.integers(0, 3))
    def promote(self, choice: int) -> None:
        self.transfer.promote(self.pick(choice)[1])

    @precondition(lambda self: self.tickets)
    @rule(choice=st.integers(0, 3), reuse=st.booleans())
    def cancel(self, choice: int, reuse: bool) -> None:
        place, ticket, _ = self.pick(choice)
        self.transfer.cancel(ticket)
        assert ticket.done
        if reuse:
            ticket.settle()
            assert ticket.settled
            del self.tickets[place]

    @precondition(lambda self: self.tickets)
    @rule(choice=st.integers(0, 3))
    def wait(self, choice: int) -> None:
        place, ticket, data = self.pick(choice)
        try:
            ticket.wait()
            assert torch.equal(self.buffers[place][: data.numel()], data)
        except Cancelled:
            assert ticket.outcome is Outcome.CANCELLED
            ticket.settle()
        del self.tickets[place]

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        if isinstance(self.transfer, NullTransfer):
            self.transfer.step(count)

    @rule()
    def begin(self) -> None:
        if isinstance(self.transfer, NullTransfer):
            self.transfer.begin()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "transfer"):
            self.transfer.check()

    def pick(self, choice: int) -> tuple[int, Entry, torch.Tensor]:
        place = sorted(self.tickets)[choice % len(self.tickets)]
        return place, *self.tickets[place]

    def teardown(self) -> None:
        if not hasattr(self, "transfer"):
            return
        self.transfer.close()
        assert all(ticket.settled for ticket, _ in self.tickets.values())
        self.transfer.check()
        counters = self.transfer.counters()
        assert counters.submitted == counters.succeeded + counters.cancelled == self.num_submitted


class ThreadMachine(TransferMachine):
    def make(self, seed: int | None) -> Transfer:
        return ThreadTransfer(2, CHUNK_BYTES) if seed is None else EmulatedTransfer(1e8, CHUNK_BYTES)


TestNullMachine = TransferMachine.TestCase
TestNullMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestThreadMachine = ThreadMachine.TestCase
TestThreadMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
