"""Transfers to a CUDA device: two copy streams, pinned host memory, events as tickets.

A demand from pinned memory is put on its stream at once, as a single copy, by the thread that submits it. Everything
else waits in the queue for a feeder thread, which keeps at most two chunks of guesses on the device and none while a
demand travels, so that a demand never stands behind more than that. `wait` makes the compute stream wait; the host
blocks only while chunks are still queued. A device that fails fails every ticket, and all that come after. What is on
the device, and when it happened: `device_queue`.
"""

# torch.cuda is not annotated.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import Cancelled, DeviceFailed, TransferFailed
from .backend import Backend
from .base import Fence, Priority, Source, Ticket
from .device_queue import CudaEntry, DeviceQueue, Flight, Stall
from .ledger import Chunk

# 80 µs at 50 GB/s: the feeder issues the next chunk well within the time that one takes.
CHUNK_BYTES = 4 << 20
_POLL_S = 0.02  # how long a stop may go unnoticed by a host thread that waits for a queued chunk
_SETTLE_POLL_S = 50e-6
_MAX_GUESSED_CHUNKS = 2  # on the device: one travels while the feeder wakes up to issue the next


class CudaTicket(CudaEntry):
    def __init__(
        self,
        transfer: CudaTransfer,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object,
        after: Fence | None,
    ) -> None:
        super().__init__(source, destination, priority, tag, after)
        self.transfer = transfer

    @property
    def done(self) -> bool:
        return self.ended or self.transfer.has_landed(self)

    @property
    def settled(self) -> bool:
        if not self.at_rest:
            self.transfer.collect()
        return self.at_rest

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        return self.transfer.wait(self, cancelled)

    def settle(self) -> None:
        while not self.settled:
            time.sleep(_SETTLE_POLL_S)


class CudaTransfer(Backend[CudaEntry]):
    """See `Transfer`. Sources are `MemorySource` only; pageable ones work, slower, and are counted."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(chunk_bytes)
        self._device = device
        self._queue = DeviceQueue(device)
        self._queued = threading.Condition(self._lock)  # there may be something to move, or the end has come
        self._issued = threading.Condition(self._lock)
        # A daemon, because a program that dies without `close` must not hang at exit.
        self._feeder = threading.Thread(target=self._run, name="moepic-transfer-feeder", daemon=True)
        self._feeder.start()

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
            self._admit(ticket)
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
        blocked_s = 0.0
        if not ticket.done:
            with self._device_asked():
                blocked_s = self._have_compute_wait(ticket, cancelled)
        ticket.raise_error()
        return blocked_s

    def has_landed(self, ticket: CudaTicket) -> bool:
        """One look at the device, without the lock and before the books know: a layer takes dozens of them."""
        if ticket.issued_bytes == ticket.nbytes:  # so `last_events` is complete
            with self._device_asked():
                if all(end.query() for end in ticket.last_events.values()):
                    return True
        return ticket.ended

    def fence(self) -> Fence:
        event = torch.cuda.Event()
        with self._device_asked():
            event.record(torch.cuda.current_stream(self._device))
        return Fence(event)  # on a device that has failed, an event that nobody has to wait for

    def collect(self) -> None:
        """Bring the books up to what the device has done. Does not wait for it."""
        with self._lock:
            self._collect()

    def close(self) -> None:
        self._shut(Cancelled("the transfer backend was closed"))
        self._feeder.join()
        with self._device_asked():
            self._queue.synchronize()
        self.collect()

    def _shut(self, error: TransferFailed | Cancelled) -> None:
        with self._lock:
            self._end(error)
            self._queued.notify_all()
            self._issued.notify_all()

    @contextmanager
    def _device_asked(self) -> Iterator[None]:
        """Within, a device that has failed says so: then nothing on it will ever end, and every ticket has failed."""
        try:
            yield
        except RuntimeError as error:
            failure = DeviceFailed(error)
            with self._lock:
                self._shut(failure)
                self._queue.abandon(self._ledger, failure)

    def _collect(self) -> None:
        with self._device_asked():
            self._queue.collect(self._ledger)

    def _run(self) -> None:
        try:
            while self._closed is None:
                self._feed()
        except BaseException as error:
            # A bug of ours. Whoever waits must hear of it; the traceback goes to threading.excepthook.
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
            obstacle = None
            if ticket.priority is Priority.PREFETCH:
                obstacle = self._queue.ahead_of_a_guess(_MAX_GUESSED_CHUNKS)
            chunk = self._ledger.take() if obstacle is None else None
        if obstacle is not None:
            with self._device_asked():
                obstacle.synchronize()
        elif chunk is not None:
            self._issue(chunk)

    def _take_all(self, ticket: CudaTicket) -> Chunk[CudaEntry] | None:
        """What is left of a demand that this thread can issue without blocking; otherwise wakes the feeder."""
        if ticket.pinned and ticket.priority is Priority.DEMAND:
            return self._ledger.take(ticket, limit_bytes=ticket.nbytes)
        self._queued.notify()
        return None

    def _issue(self, chunk: Chunk[CudaEntry]) -> None:
        """Put one copy on its stream. Blocks while pageable memory is read."""
        ticket, issued_s = chunk.entry, time.perf_counter()
        flight: Flight | TransferFailed = TransferFailed("the thread that issued this copy died")
        try:
            flight = self._put_on_stream(chunk)
        finally:
            with self._lock:
                if isinstance(flight, TransferFailed):
                    self._ledger.finish(chunk, issued_s, time.perf_counter(), flight)
                else:
                    ticket.last_events[chunk.priority] = flight.end
                    ticket.issued_bytes += chunk.nbytes  # after it, because `has_landed` takes no lock
                    self._queue.took_off(flight)
                    self._ledger.unpinned_bytes += 0 if ticket.pinned else chunk.nbytes
                self._issued.notify_all()

    def _put_on_stream(self, chunk: Chunk[CudaEntry]) -> Flight | TransferFailed:
        """At the second try if need be; why it failed, if it did."""
        try:
            return self._queue.put(chunk)
        except RuntimeError:
            with self._lock:
                self._ledger.num_retried += 1
        try:
            return self._queue.put(chunk)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            return TransferFailed(f"cannot copy {chunk.nbytes} bytes to the device, tried twice: {reason}")

    def _have_compute_wait(self, ticket: CudaTicket, cancelled: Callable[[], bool] | None) -> float:
        """Seconds for which this thread was blocked before the compute stream could be told what to wait for."""
        compute = torch.cuda.current_stream(self._device)
        reached = torch.cuda.Event(enable_timing=True)
        reached.record(compute)  # before the host blocks, so that the stream's idle time counts as stall
        blocked_s = self._wait_until_issued(ticket, cancelled)
        if ticket.error is None:
            ends = list(ticket.last_events.values())
            for end in ends:
                compute.wait_event(end)
            with self._lock:
                self._queue.stalls(Stall(ticket, reached, ends))
        return blocked_s

    def _wait_until_issued(self, ticket: CudaTicket, cancelled: Callable[[], bool] | None) -> float:
        """Block until all chunks are on a stream or the ticket has ended; seconds."""
        start_s = time.perf_counter()
        while True:
            with self._lock:
                if self._issued.wait_for(lambda: ticket.ended or ticket.issued_bytes == ticket.nbytes, _POLL_S):
                    return time.perf_counter() - start_s
            if cancelled is not None and cancelled():
                raise Cancelled("stopped while waiting for a transfer")
