"""Transfers to a CUDA device: two copy streams, pinned host memory, events as tickets.

A demand from pinned memory is put on its stream at once, as a single copy, by the thread that submits it. Everything
else waits in the queue for a feeder thread, which keeps at most two chunks of guesses on the device and none while a
demand travels, so that a demand never stands behind more than that. `wait` makes the compute stream wait; the host
blocks only while chunks are still queued. Times are the device's own, collected without synchronising.
"""

# torch.cuda is not annotated.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import Cancelled, MoepicError, TransferFailed
from .base import Fence, MemorySource, Priority, Source, Ticket, TransferCounters, TransferEvent
from .clocks import DeviceClock
from .ledger import Chunk, Entry, Ledger

# 80 µs at 50 GB/s: the feeder issues the next chunk well within the time that one takes.
CHUNK_BYTES = 4 << 20
_POLL_S = 0.02  # how long a stop may go unnoticed by a host thread that waits for a queued chunk
_SETTLE_POLL_S = 50e-6
_MAX_GUESSED_CHUNKS = 2  # on the device: one travels while the feeder wakes up to issue the next


class CudaTicket(Entry):
    def __init__(
        self,
        transfer: CudaTransfer,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object,
        after: Fence | None,
    ) -> None:
        super().__init__(source, destination, priority, tag, time.perf_counter())
        assert isinstance(source, MemorySource), f"{source} is no host memory; a CUDA device copies from nothing else"
        self.transfer = transfer
        self.memory = source.tensor
        self.pinned = source.tensor.is_pinned()
        self.after = None if after is None else after.event
        self.issued_bytes = 0  # copies that are on a stream
        self.last_events: dict[Priority, torch.cuda.Event] = {}  # end of the latest copy on each stream

    @property
    def done(self) -> bool:
        self.transfer.collect()
        return super().done

    @property
    def settled(self) -> bool:
        self.transfer.collect()
        return super().settled

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        return self.transfer.wait(self, cancelled)

    def settle(self) -> None:
        while not self.settled:
            time.sleep(_SETTLE_POLL_S)


class Flight(NamedTuple):
    """A chunk on a stream, between two timing events."""

    chunk: Chunk[CudaTicket]
    start: torch.cuda.Event
    end: torch.cuda.Event


class Stall(NamedTuple):
    """The compute stream came to `reached` and goes on after `ends`."""

    reached: torch.cuda.Event
    ends: list[torch.cuda.Event]


class CudaTransfer:
    """See `Transfer`. Sources are `MemorySource` only; pageable ones work, slower, and are counted."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._ledger: Ledger[CudaTicket] = Ledger(chunk_bytes)
        self._streams = {
            Priority.DEMAND: torch.cuda.Stream(device, priority=-1),
            Priority.PREFETCH: torch.cuda.Stream(device, priority=0),
        }
        self._flights: dict[Priority, deque[Flight]] = {priority: deque() for priority in Priority}  # in stream order
        self._stalls: deque[Stall] = deque()
        self._clock = DeviceClock(self._streams[Priority.DEMAND])
        self._closed: MoepicError | None = None
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)
        self._issued = threading.Condition(self._lock)
        # A daemon, because a program that dies without `close` must not hang at exit.
        self._feeder = threading.Thread(target=self._run, name="moepic-transfer-feeder", daemon=True)
        self._feeder.start()

    @property
    def chunk_bytes(self) -> int:
        return self._ledger.chunk_bytes

    def submit(
        self,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object = None,
        after: Fence | None = None,
    ) -> CudaTicket:
        ticket = CudaTicket(self, source, destination, priority, tag, after)
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._ledger.admit(ticket)
            chunk = self._take_all(ticket)
        if chunk is not None:
            self._issue(chunk)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket), ticket
        with self._lock:
            self._ledger.promote(ticket)
            chunk = self._take_all(ticket)
        if chunk is not None:
            self._issue(chunk)

    def cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, CudaTicket), ticket
        with self._lock:
            self._collect()
            self._ledger.drop(ticket, Cancelled("this transfer was cancelled"))
            self._issued.notify_all()

    def wait(self, ticket: CudaTicket, cancelled: Callable[[], bool] | None) -> float:
        """See `Ticket.wait`."""
        if ticket.done:
            ticket.raise_error()
            return 0.0
        compute = torch.cuda.current_stream(self._device)
        reached = torch.cuda.Event(enable_timing=True)
        reached.record(compute)  # before the host blocks, so that the stream's idle time counts as stall
        blocked_s = self._wait_until_issued(ticket, cancelled)
        ticket.raise_error()
        with self._lock:
            ends = list(ticket.last_events.values())
            self._stalls.append(Stall(reached, ends))
        for end in ends:
            compute.wait_event(end)
        return blocked_s

    def fence(self) -> Fence:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return Fence(event)

    def collect(self) -> None:
        """Bring the books up to what the device has done. Does not wait for it."""
        with self._lock:
            self._collect()

    def drain_events(self) -> list[TransferEvent]:
        with self._lock:
            self._collect()
            if not self._stalls and self._ledger.num_live == 0:
                self._clock.renew()
            return self._ledger.drain_events()

    def counters(self) -> TransferCounters:
        with self._lock:
            self._collect()
            return self._ledger.counters()

    def check(self) -> None:
        with self._lock:
            self._collect()
            self._ledger.check()

    def close(self) -> None:
        self._shut(Cancelled("the transfer backend was closed"))
        self._feeder.join()
        for stream in self._streams.values():
            stream.synchronize()
        self.collect()

    def _shut(self, error: TransferFailed | Cancelled) -> None:
        with self._lock:
            self._closed = self._closed or error
            self._ledger.drop_all(error)
            self._queued.notify_all()
            self._issued.notify_all()

    def _run(self) -> None:
        try:
            while self._closed is None:
                self._feed()
        except BaseException as error:
            # A bug of ours, or a broken device. Whoever waits must hear of it; the traceback goes to excepthook.
            self._shut(TransferFailed(f"the thread that feeds the device died of {error!r}; restart the engine"))
            raise

    def _feed(self) -> None:
        """Issue the next queued chunk, or sleep until there is one and the device should have it."""
        with self._lock:
            while (ticket := self._ledger.peek()) is None:
                if self._closed is not None:
                    return
                self._queued.wait()
            self._collect()
            obstacle = self._obstacle(ticket)
            chunk = self._ledger.take() if obstacle is None else None
        if obstacle is not None:
            obstacle.synchronize()
        elif chunk is not None:
            self._issue(chunk)

    def _obstacle(self, ticket: CudaTicket) -> torch.cuda.Event | None:
        """What has to leave the link before the next chunk, which is `ticket`'s, may be put on it."""
        demands, guesses = self._flights[Priority.DEMAND], self._flights[Priority.PREFETCH]
        if ticket.priority is Priority.DEMAND:
            return None
        if demands:
            return demands[-1].end
        return guesses[0].end if len(guesses) >= _MAX_GUESSED_CHUNKS else None

    def _take_all(self, ticket: CudaTicket) -> Chunk[CudaTicket] | None:
        """What is left of a demand that this thread can issue without blocking; otherwise wakes the feeder."""
        if ticket.pinned and ticket.priority is Priority.DEMAND:
            return self._ledger.take(ticket, limit_bytes=ticket.nbytes)
        self._queued.notify()
        return None

    def _issue(self, chunk: Chunk[CudaTicket]) -> None:
        """Put one copy on its stream, at the second try if need be. Blocks while pageable memory is read."""
        ticket = chunk.entry
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # the feeder sleeps on it, it does not spin
        flight, issued_s = Flight(chunk, start, end), time.perf_counter()
        error: TransferFailed | None = TransferFailed("the thread that issued this copy died")
        try:
            error = self._put_on_stream(flight)
        finally:
            with self._lock:
                if error is None:
                    ticket.issued_bytes += chunk.nbytes
                    ticket.last_events[chunk.priority] = end
                    self._flights[chunk.priority].append(flight)
                    self._ledger.unpinned_bytes += 0 if ticket.pinned else chunk.nbytes
                else:
                    self._ledger.finish(chunk, issued_s, time.perf_counter(), error)
                self._issued.notify_all()

    def _put_on_stream(self, flight: Flight) -> TransferFailed | None:
        try:
            _copy(flight, self._streams[flight.chunk.priority])
            return None
        except RuntimeError:
            with self._lock:
                self._ledger.num_retried += 1
        try:
            _copy(flight, self._streams[flight.chunk.priority])
            return None
        except RuntimeError as error:
            return TransferFailed(f"cannot copy {flight.chunk.nbytes} bytes to the device, tried twice: {error}")

    def _wait_until_issued(self, ticket: CudaTicket, cancelled: Callable[[], bool] | None) -> float:
        """Block until all chunks are on a stream or the ticket has ended; seconds."""
        start_s = time.perf_counter()
        while True:
            with self._lock:
                if self._issued.wait_for(lambda: ticket.ended or ticket.issued_bytes == ticket.nbytes, _POLL_S):
                    return time.perf_counter() - start_s
            if cancelled is not None and cancelled():
                raise Cancelled("stopped while waiting for a transfer")

    def _collect(self) -> None:
        clock = self._clock
        for flights in self._flights.values():
            while flights and flights[0].end.query():
                chunk, start, end = flights.popleft()
                self._ledger.finish(chunk, clock.host_s(start), clock.host_s(end))
        while self._stalls and self._stalls[0].reached.query() and all(end.query() for end in self._stalls[0].ends):
            reached, ends = self._stalls.popleft()
            stalled_s = max(clock.host_s(end) for end in ends) - clock.host_s(reached)
            self._ledger.stalled_s += max(0.0, stalled_s)


def _copy(flight: Flight, stream: torch.cuda.Stream) -> None:
    """Enqueue the chunk between its two events. Raises RuntimeError."""
    chunk, ticket = flight.chunk, flight.chunk.entry
    part = slice(chunk.offset, chunk.offset + chunk.nbytes)
    # Inference mode, because outside of it torch refuses to write to a buffer that was made inside of it.
    with torch.inference_mode(), torch.cuda.stream(stream):
        if ticket.after is not None:
            stream.wait_event(ticket.after)
        flight.start.record(stream)
        ticket.destination[part].copy_(ticket.memory[part], non_blocking=True)
        flight.end.record(stream)
