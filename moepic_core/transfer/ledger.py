"""The books of a transfer backend: who waits, what is in flight, what arrived. Pure: no thread, no clock, no copy.

Each backend owns one ledger, calls it under its own lock and does the moving itself; so order of service, promotion,
cancelling and every counter are the same everywhere, and are tested once. A ticket of a backend is an `Entry` that also
knows how to wait.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

import torch

from ..errors import Cancelled, MoepicError, TransferFailed
from ..units import ALIGNMENT_BYTES
from .base import Priority, Source, StallEvent, TransferCounters, TransferEvent, check_request
from .clocks import BusyTime

_MAX_EVENTS = 1 << 16


class Outcome(IntEnum):
    OPEN = 0
    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3


class Entry:
    """The books of one ticket. Only its ledger writes them.

    It refers to both ends of the copy while a chunk is in flight, so neither memory can go away under it.
    """

    def __init__(
        self, source: Source, destination: torch.Tensor, priority: Priority, tag: object, submitted_s: float
    ) -> None:
        check_request(source, destination)
        self.source = source
        self.destination = destination
        self.priority = priority
        self.tag = tag
        self.nbytes = source.nbytes
        self.submitted_s = submitted_s
        self.outcome = Outcome.OPEN
        self.error: MoepicError | None = None
        self.taken_bytes = 0  # handed out as chunks
        self.landed_bytes = 0
        self.lost_bytes = 0  # in chunks that failed
        self.num_in_flight = 0

    @property
    def ended(self) -> bool:
        """As far as the ledger has been told."""
        return self.outcome is not Outcome.OPEN

    @property
    def at_rest(self) -> bool:
        return self.ended and self.num_in_flight == 0

    @property
    def done(self) -> bool:
        return self.ended

    @property
    def settled(self) -> bool:
        return self.at_rest

    @property
    def in_flight_bytes(self) -> int:
        return self.taken_bytes - self.landed_bytes - self.lost_bytes

    def raise_error(self) -> None:
        """Raise why there is no data, if there is none."""
        if self.error is not None:
            raise self.error


E = TypeVar("E", bound=Entry)


class Chunk(NamedTuple, Generic[E]):
    """A piece of a ticket on its way: bytes [offset, offset + nbytes) of source and destination."""

    entry: E
    offset: int
    nbytes: int
    priority: Priority  # of the ticket when the chunk started


class Ledger(Generic[E]):
    def __init__(self, chunk_bytes: int) -> None:
        assert chunk_bytes > 0, chunk_bytes
        assert chunk_bytes % ALIGNMENT_BYTES == 0, f"chunks of {chunk_bytes} bytes would break O_DIRECT's alignment"
        self.chunk_bytes = chunk_bytes
        self.num_retried = 0
        self.unpinned_bytes = 0
        self._queues: list[deque[E]] = [deque() for _ in Priority]  # first served first
        self._live: set[E] = set()  # open, or with a chunk in flight
        self._num_outcomes = [0] * len(Outcome)
        self._num_submitted = 0
        self._submitted_bytes = 0
        self._in_flight_bytes = 0
        self._landed_bytes = [0] * len(Priority)
        self._lost_bytes = 0
        self._dropped_bytes = 0  # never handed out, because the ticket failed or was cancelled
        self._busy = BusyTime()
        self._events: deque[TransferEvent] = deque(maxlen=_MAX_EVENTS)
        self._stalls: deque[StallEvent] = deque(maxlen=_MAX_EVENTS)
        self._stalled_s = 0.0

    @property
    def num_live(self) -> int:
        return len(self._live)

    def admit(self, entry: E) -> None:
        """A new ticket joins the end of its queue."""
        self._queues[entry.priority].append(entry)
        self._live.add(entry)
        self._num_outcomes[Outcome.OPEN] += 1
        self._num_submitted += 1
        self._submitted_bytes += entry.nbytes

    def peek(self) -> E | None:
        """The ticket whose turn it is."""
        for queue in self._queues:
            if queue:
                return queue[0]
        return None

    def take(self, entry: E | None = None, limit_bytes: int | None = None) -> Chunk[E] | None:
        """The next chunk of `entry`, or of the ticket whose turn it is, is in flight from now on.

        None if nothing is queued. `limit_bytes` replaces the usual size of a chunk.
        """
        entry = self.peek() if entry is None else entry
        if entry is None or entry.ended or entry.taken_bytes == entry.nbytes:
            return None
        offset = entry.taken_bytes
        nbytes = min(entry.nbytes - offset, limit_bytes or self.chunk_bytes)
        entry.taken_bytes += nbytes
        entry.num_in_flight += 1
        self._in_flight_bytes += nbytes
        if entry.taken_bytes == entry.nbytes:
            self._queues[entry.priority].remove(entry)
        return Chunk(entry, offset, nbytes, entry.priority)

    def finish(self, chunk: Chunk[E], start_s: float, end_s: float, error: TransferFailed | None = None) -> None:
        """`chunk` has arrived, or failed for good with `error`, and was in flight from `start_s` to `end_s`."""
        entry = chunk.entry
        entry.num_in_flight -= 1
        self._in_flight_bytes -= chunk.nbytes
        if error is None:
            entry.landed_bytes += chunk.nbytes
            self._landed_bytes[chunk.priority] += chunk.nbytes
        else:
            entry.lost_bytes += chunk.nbytes
            self._lost_bytes += chunk.nbytes
            self.drop(entry, error)
        if entry.landed_bytes == entry.nbytes and not entry.ended:
            self._close(entry, Outcome.SUCCEEDED)
        if entry.at_rest:
            self._live.discard(entry)
        self._busy.add(start_s, end_s)
        nbytes = chunk.nbytes if error is None else 0
        self._events.append(TransferEvent(entry.tag, chunk.priority, start_s, end_s, nbytes))

    def stall(self, entry: E, start_s: float, end_s: float) -> None:
        """Compute had nothing to do but wait for `entry`. No stall at all if it ends no later than it starts."""
        if end_s > start_s:
            self._stalled_s += end_s - start_s
            self._stalls.append(StallEvent(entry.tag, start_s, end_s))

    def promote(self, entry: E) -> None:
        """What is left of a guess joins the end of the demands."""
        if entry.priority is Priority.DEMAND or entry.ended:
            return
        entry.priority = Priority.DEMAND
        if entry.taken_bytes < entry.nbytes:
            self._queues[Priority.PREFETCH].remove(entry)
            self._queues[Priority.DEMAND].append(entry)

    def drop(self, entry: E, error: TransferFailed | Cancelled) -> bool:
        """`entry` ends with `error` unless it is done already; its queued chunks never start. Whether it was open."""
        if entry.ended:
            return False
        if entry.taken_bytes < entry.nbytes:
            self._queues[entry.priority].remove(entry)
            self._dropped_bytes += entry.nbytes - entry.taken_bytes
        entry.error = error
        self._close(entry, Outcome.FAILED if isinstance(error, TransferFailed) else Outcome.CANCELLED)
        if entry.at_rest:
            self._live.discard(entry)
        return True

    def drop_all(self, error: TransferFailed | Cancelled) -> list[E]:
        """Every open ticket ends with `error`; returns them."""
        return [entry for entry in list(self._live) if self.drop(entry, error)]

    def drain_events(self) -> list[TransferEvent]:
        events = list(self._events)
        self._events.clear()
        return events

    def drain_stalls(self) -> list[StallEvent]:
        stalls = list(self._stalls)
        self._stalls.clear()
        return stalls

    def counters(self) -> TransferCounters:
        return TransferCounters(
            submitted=self._num_submitted,
            succeeded=self._num_outcomes[Outcome.SUCCEEDED],
            failed=self._num_outcomes[Outcome.FAILED],
            cancelled=self._num_outcomes[Outcome.CANCELLED],
            retried=self.num_retried,
            demand_bytes=self._landed_bytes[Priority.DEMAND],
            prefetch_bytes=self._landed_bytes[Priority.PREFETCH],
            unpinned_bytes=self.unpinned_bytes,
            busy_s=self._busy.total_s,
            stalled_s=self._stalled_s,
        )

    def check(self) -> None:
        """Assert that no ticket and no byte is lost or counted twice."""
        num_closed = sum(self._num_outcomes)
        assert self._num_submitted == num_closed, (self._num_submitted, self._num_outcomes)
        num_open = sum(not entry.ended for entry in self._live)
        assert self._num_outcomes[Outcome.OPEN] == num_open, (self._num_outcomes, num_open)
        for priority, queue in zip(Priority, self._queues, strict=True):
            wanted = {
                entry
                for entry in self._live
                if not entry.ended and entry.priority is priority and entry.taken_bytes < entry.nbytes
            }
            assert len(queue) == len(wanted), (priority, len(queue), len(wanted))
            assert set(queue) == wanted, (priority, [entry.tag for entry in queue], [entry.tag for entry in wanted])
        for entry in self._live:
            assert not entry.at_rest, (entry.tag, entry.outcome)
            assert (entry.num_in_flight == 0) == (entry.in_flight_bytes == 0), (entry.tag, entry.in_flight_bytes)
        queued = sum(entry.nbytes - entry.taken_bytes for queue in self._queues for entry in queue)
        in_flight = sum(entry.in_flight_bytes for entry in self._live)
        assert self._in_flight_bytes == in_flight, (self._in_flight_bytes, in_flight)
        finished = sum(self._landed_bytes) + self._lost_bytes + self._dropped_bytes
        assert self._submitted_bytes == queued + in_flight + finished, (
            self._submitted_bytes,
            (queued, in_flight, self._landed_bytes, self._lost_bytes, self._dropped_bytes),
        )

    def _close(self, entry: E, outcome: Outcome) -> None:
        entry.outcome = outcome
        self._num_outcomes[Outcome.OPEN] -= 1
        self._num_outcomes[outcome] += 1
