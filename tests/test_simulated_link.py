"""The link in closed form against the engine's own books, chunk by chunk, and against answers worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepic_core.costs import Costs
from moepic_core.errors import Cancelled
from moepic_core.simulated_link import Run, SimulatedLink, Ticket
from moepic_core.trace import Part
from moepic_core.transfer.base import MemorySource, Priority
from moepic_core.transfer.ledger import Chunk, Entry, Ledger

CHUNK_BYTES = 4096


def costs(latency_s: float = 0.0, bytes_per_s: float = CHUNK_BYTES) -> Costs:
    """By default a chunk takes one second."""
    return Costs((), 0.0, bytes_per_s, latency_s, CHUNK_BYTES, "measured")


class ChunkwiseLink:
    """The slow reference: the ledger of the transfer backends, served one chunk at a time."""

    def __init__(self, latency_s: float) -> None:
        self.ledger: Ledger[Entry] = Ledger(CHUNK_BYTES)
        self.latency_s = latency_s
        self.now_s = 0.0
        self.under_way: tuple[Chunk[Entry], float, float] | None = None
        self.landed_s: dict[int, float] = {}  # number of an entry → when its last chunk landed

    def submit(self, number: int, num_chunks: int, priority: Priority, now_s: float) -> Entry:
        self.run_until(now_s)
        memory = torch.empty(num_chunks * CHUNK_BYTES, dtype=torch.uint8)
        entry = Entry(MemorySource(memory), memory.clone(), priority, number, now_s)
        self.ledger.admit(entry)
        self.run_until(now_s)
        return entry

    def run_until(self, now_s: float) -> None:
        """Chunks land that end by now, and the next start as soon as the link is free."""
        while True:
            if self.under_way is None:
                chunk = self.ledger.take()
                if chunk is None:
                    break
                seconds = chunk.nbytes / CHUNK_BYTES + (self.latency_s if chunk.offset == 0 else 0.0)
                self.under_way = chunk, self.now_s, self.now_s + seconds
            chunk, start_s, end_s = self.under_way
            if end_s > now_s:
                break
            self.ledger.finish(chunk, start_s, end_s)
            self.landed_s[chunk.entry.tag] = self.now_s = end_s
            self.under_way = None
        if self.under_way is None:
            self.now_s = max(self.now_s, now_s)

    def check(self) -> None:
        self.ledger.check()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["demand", "prefetch", "prefetch", "promote", "cancel"]),
        st.integers(1, 9),  # chunks, or which of the guesses
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5, 7.0]),  # seconds since the event before
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, latency_s=st.sampled_from([0.0, 0.125, 3.0]))
def test_serves_as_the_ledger_does(events: list[tuple[str, int, float]], latency_s: float) -> None:
    """Every time here is a multiple of 1/8, so the answers must be equal, not close."""
    link, reference = SimulatedLink(costs(latency_s), with_runs=True), ChunkwiseLink(latency_s)
    now_s = 0.0
    tickets: list[Ticket] = []
    entries: list[Entry] = []
    guesses: list[int] = []
    for kind, number, seconds in events:
        now_s += seconds
        reference.run_until(now_s)
        if kind in ("demand", "prefetch"):
            submit = link.demand if kind == "demand" else link.prefetch
            priority = Priority.DEMAND if kind == "demand" else Priority.PREFETCH
            tickets.append(submit(0, len(tickets), Part.WHOLE, number * CHUNK_BYTES, now_s))
            entries.append(reference.submit(len(entries), number, priority, now_s))
            if kind == "prefetch":
                guesses.append(len(tickets) - 1)
        elif guesses:
            guess = guesses.pop(number % len(guesses))
            if kind == "promote":
                link.promote(tickets[guess], now_s)
                reference.ledger.promote(entries[guess])
            else:
                link.cancel(tickets[guess], now_s)
                reference.ledger.drop(entries[guess], Cancelled("by the test"))
        link.advance(now_s)
        reference.run_until(now_s)
        link.check()
        reference.check()
        for ticket, entry in zip(tickets, entries, strict=True):
            assert (ticket.landed_s <= now_s) == (entry.landed_bytes == entry.nbytes), (ticket.landed_s, now_s)
    link.advance(1e6)
    reference.run_until(1e6)
    assert [ticket.taken_bytes for ticket in tickets] == [entry.taken_bytes for entry in entries]
    assert {n: ticket.taken_s for n, ticket in enumerate(tickets) if ticket.taken_bytes} == reference.landed_s
    counters = reference.ledger.counters()
    assert (link.demand_bytes, link.prefetch_bytes) == (counters.demand_bytes, counters.prefetch_bytes)
    assert link.busy_s == counters.busy_s
    by_run, by_chunk = Counter[tuple[int, bool]](), Counter[tuple[int, bool]]()
    for run in link.drain_runs():
        by_run[run.expert, run.demand] += run.nbytes
    for event in reference.ledger.drain_events():
        by_chunk[event.tag, event.priority is Priority.DEMAND] += event.nbytes
    assert by_run == by_chunk


def test_a_demand_waits_for_the_chunk_under_way_and_the_guess_goes_on_after_it() -> None:
    link = SimulatedLink(costs(latency_s=0.5), with_runs=True)
    guess = link.prefetch(1, 7, Part.BOTTOM, 4 * CHUNK_BYTES, 0.0)
    demand = link.demand(0, 3, Part.TOP, 2 * CHUNK_BYTES, 2.0)  # the guess's second chunk lands at 2.5
    link.advance(100.0)
    assert (demand.landed_s, guess.landed_s) == (5.0, 7.0)
    assert link.drain_runs() == [
        Run(1, 7, Part.BOTTOM, False, 2 * CHUNK_BYTES, 0.0, 2.5),
        Run(0, 3, Part.TOP, True, 2 * CHUNK_BYTES, 2.5, 5.0),
        Run(1, 7, Part.BOTTOM, False, 2 * CHUNK_BYTES, 5.0, 7.0),
    ]
    assert (link.busy_s, link.demand_bytes, link.prefetch_bytes) == (7.0, 2 * CHUNK_BYTES, 4 * CHUNK_BYTES)
    assert link.drain_runs() == []


def test_a_link_without_end_lands_everything_at_once() -> None:
    link = SimulatedLink(costs(bytes_per_s=float("inf")), with_runs=False)
    guess, demand = link.prefetch(0, 0, Part.WHOLE, 10**9, 1.0), link.demand(0, 1, Part.WHOLE, 10**9, 1.0)
    assert (guess.landed_s, demand.landed_s) == (1.0, 1.0)
    with pytest.raises(AssertionError, match="not kept"):
        link.drain_runs()
