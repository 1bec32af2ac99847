"""A transfer backend without threads, in the hands of a test: nothing moves unless the test says so.

`submit` poisons the destination (0xFF, which is NaN in every float type), so whoever reads before `wait` sees it. Data
arrive when the test calls `step()`, or `begin()` and `end()` to stop a chunk in mid-flight; `wait` moves whatever is
due before its ticket, in the contract's order or, with a seed, in a random one. The clock is synthetic: one chunk, one
second. It also asserts that nobody submits into a buffer that an unsettled ticket still owns.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable

import torch

from moepic_core.errors import Cancelled, MoepicError, TransferFailed
from moepic_core.transfer.base import (
    Fence,
    FileSource,
    MemorySource,
    Priority,
    Source,
    StallEvent,
    Ticket,
    TransferCounters,
    TransferEvent,
)
from moepic_core.transfer.ledger import Chunk, Entry, Ledger

POISON = 0xFF


class NullTicket(Entry):
    def __init__(
        self, transfer: NullTransfer, source: Source, destination: torch.Tensor, priority: Priority, tag: Hashable
    ) -> None:
        super().__init__(source, destination, priority, tag, transfer.now_s)
        self.transfer = transfer

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        start_s = self.transfer.now_s
        while not self.done:
            if cancelled is not None and cancelled():
                raise Cancelled("stopped while waiting for a transfer")
            self.transfer.move_for(self)
        self.raise_error()
        self.transfer.ledger.stall(self, start_s, self.transfer.now_s)
        return self.transfer.now_s - start_s

    def settle(self) -> None:
        for chunk in [chunk for chunk in self.transfer.in_flight if chunk.entry is self]:
            self.transfer.end(chunk)
        assert self.settled, f"{self.tag} is {self.outcome}; settle follows cancel or a failure"


class NullTransfer:
    """See `Transfer`. `seed` None serves in the contract's order."""

    def __init__(self, seed: int | None = None, chunk_bytes: int = 4096) -> None:
        self.ledger: Ledger[NullTicket] = Ledger(chunk_bytes)
        self.now_s = 0.0
        self.in_flight: list[Chunk[NullTicket]] = []
        self.failures: dict[Hashable, float] = {}  # tag -> attempts that will still fail; 1: the retry succeeds
        self.held: set[Hashable] = set()  # tags of tickets that move only when somebody waits for them
        self._random = None if seed is None else random.Random(seed)
        self._open: list[NullTicket] = []  # in the order of submission or promotion
        self._closed: MoepicError | None = None

    @property
    def chunk_bytes(self) -> int:
        return self.ledger.chunk_bytes

    def submit(
        self,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: Hashable = None,
        after: Fence | None = None,
    ) -> NullTicket:
        if self._closed is not None:
            raise self._closed
        ticket = NullTicket(self, source, destination, priority, tag)
        start, end = destination.data_ptr(), destination.data_ptr() + destination.numel()
        for other in (*self._open, *(chunk.entry for chunk in self.in_flight)):
            other_start = other.destination.data_ptr()
            overlaps = other_start < end and start < other_start + other.nbytes
            assert other.settled or not overlaps, f"{tag} would overwrite the destination of {other.tag}, still in use"
        destination.fill_(POISON)
        self.ledger.admit(ticket)
        self._open.append(ticket)
        return ticket

    def start(self) -> None:
        """Tests say when something moves."""

    def promote(self, ticket: Ticket) -> None:
        assert isinstance(ticket, NullTicket), ticket
        if ticket.priority is Priority.PREFETCH and not ticket.done:
            self._open.remove(ticket)
            self._open.append(ticket)
        self.ledger.promote(ticket)

    def cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, NullTicket), ticket
        self.ledger.drop(ticket, Cancelled("this transfer was cancelled"))

    def fence(self) -> Fence:
        return Fence()

    def drain_events(self) -> list[TransferEvent]:
        return self.ledger.drain_events()

    def drain_stalls(self) -> list[StallEvent]:
        return self.ledger.drain_stalls()

    def counters(self) -> TransferCounters:
        return self.ledger.counters()

    def check(self) -> None:
        self.ledger.check()

    def close(self) -> None:
        self._closed = self._closed or Cancelled("the transfer backend was closed")
        self.ledger.drop_all(Cancelled("the transfer backend was closed"))
        for chunk in list(self.in_flight):
            self.end(chunk)

    def step(self, count: int = 1) -> int:
        """Move up to `count` chunks, of tickets that are not held; how many there were."""
        for moved in range(count):
            chunk = self.begin()
            if chunk is None:
                return moved
            self.end(chunk)
        return count

    def begin(self, wanted: NullTicket | None = None) -> Chunk[NullTicket] | None:
        """Put the next chunk in flight. `wanted` may move although it is held."""
        self._open = [ticket for ticket in self._open if not ticket.done]
        due = [
            ticket
            for ticket in sorted(self._open, key=lambda ticket: ticket.priority is Priority.PREFETCH)
            if ticket.taken_bytes < ticket.nbytes and (ticket is wanted or ticket.tag not in self.held)
        ]
        if not due:
            return None
        ticket = due[0] if self._random is None else self._random.choice(due)
        if self._random is None and not self.held:
            assert ticket is self.ledger.peek(), (ticket.tag, self.ledger.peek())
        chunk = self.ledger.take(ticket)
        assert chunk is not None
        self.in_flight.append(chunk)
        return chunk

    def end(self, chunk: Chunk[NullTicket]) -> None:
        """Let a chunk in flight arrive, or fail if its tag should."""
        self.in_flight.remove(chunk)
        error = None
        if self._fails(chunk.entry.tag):
            self.ledger.num_retried += 1
            if self._fails(chunk.entry.tag):
                error = TransferFailed(f"{chunk.entry.tag} failed twice, as the test wished")
        if error is None:
            part = slice(chunk.offset, chunk.offset + chunk.nbytes)
            chunk.entry.destination[part] = _bytes_of(chunk.entry.source)[part]
        self.now_s += 1.0
        self.ledger.finish(chunk, self.now_s - 1.0, self.now_s, error)

    def move_for(self, ticket: NullTicket) -> None:
        """Move one chunk on behalf of somebody who waits for `ticket`."""
        mine = [chunk for chunk in self.in_flight if chunk.entry is ticket]
        chunk = mine[0] if mine else self.begin(ticket)
        assert chunk is not None, f"{ticket.tag} is {ticket.outcome} and nothing is left to move"
        self.end(chunk)

    def _fails(self, tag: Hashable) -> bool:
        left = self.failures.get(tag, 0)
        self.failures[tag] = max(0, left - 1)
        return left > 0


def _bytes_of(source: Source) -> torch.Tensor:
    """All bytes of a source, uint8 [nbytes], through the page cache whatever the file was opened with."""
    if isinstance(source, MemorySource):
        return source.tensor
    assert isinstance(source, FileSource), source
    with open(f"/proc/self/fd/{source.fd}", "rb") as file:
        data = os.pread(file.fileno(), source.nbytes, source.offset)
    assert len(data) == source.nbytes, (len(data), source.nbytes)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
