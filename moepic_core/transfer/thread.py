"""Transfers on machines without a GPU: threads read a packed file, or copy host memory, as fast as they can.

The engine makes one for a disk: two direct reads at a time fill it. Compute is synchronous here, so fences are empty
and `wait` blocks. A link of a given bandwidth is emulated in `emulated`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from ..errors import Cancelled, TransferFailed
from .backend import Backend
from .base import Fence, FileSource, Priority, Source, Ticket
from .ledger import Chunk, Entry

# Two direct reads of 2 MiB at a time give the disk's full bandwidth, of 1 MiB 94 %; a later demand waits for these two.
CHUNK_BYTES = 2 << 20
_POLL_S = 0.02  # how long a stop may go unnoticed by a thread that waits for a ticket


class ThreadTicket(Entry):
    def __init__(
        self, transfer: ThreadTransfer, source: Source, destination: torch.Tensor, priority: Priority, tag: object
    ) -> None:
        super().__init__(source, destination, priority, tag, time.perf_counter())
        self.transfer = transfer
        self.target = destination.numpy()
        self.latch = threading.Lock()  # held until done: wakes a waiter sooner than an Event and is made in 0.3 µs
        self.latch.acquire()

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        if self.done:
            self.raise_error()
            return 0.0
        start_s = time.perf_counter()
        while not self.latch.acquire(timeout=_POLL_S):
            if cancelled is not None and cancelled():
                raise Cancelled("stopped while waiting for a transfer")
        self.latch.release()
        end_s = time.perf_counter()
        self.transfer.stall(self, start_s, end_s)
        self.raise_error()
        return end_s - start_s

    def settle(self) -> None:
        self.transfer.settle(self)


class ThreadTransfer(Backend[ThreadTicket]):
    """See `Transfer`."""

    def __init__(self, num_workers: int = 1, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(chunk_bytes)
        self._queued = threading.Condition(self._lock)  # there may be something to move, or the end has come
        self._settled = threading.Condition(self._lock)
        self._workers = [
            # Daemons, because a program that dies without `close` must not hang at exit.
            threading.Thread(target=self._run, name=f"moepic-transfer-{number}", daemon=True)
            for number in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object = None,
        after: Fence | None = None,
    ) -> ThreadTicket:
        ticket = ThreadTicket(self, source, destination, priority, tag)
        with self._lock:
            self._admit(ticket)
            self._queued.notify(-(-ticket.nbytes // self._ledger.chunk_bytes))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        assert isinstance(ticket, ThreadTicket), ticket
        with self._lock:
            self._ledger.promote(ticket)

    def cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, ThreadTicket), ticket
        with self._lock:
            if self._ledger.drop(ticket, Cancelled("this transfer was cancelled")):
                ticket.latch.release()

    def settle(self, ticket: ThreadTicket) -> None:
        """See `Ticket.settle`."""
        with self._lock:
            self._settled.wait_for(lambda: ticket.settled)

    def fence(self) -> Fence:
        return Fence()

    def stall(self, ticket: ThreadTicket, start_s: float, end_s: float) -> None:
        with self._lock:
            self._ledger.stall(ticket, start_s, end_s)

    def close(self) -> None:
        self._shut(Cancelled("the transfer backend was closed"))
        for worker in self._workers:
            worker.join()

    def _shut(self, error: TransferFailed | Cancelled) -> None:
        with self._lock:
            for ticket in self._end(error):
                ticket.latch.release()
            self._queued.notify_all()
            self._settled.notify_all()

    def _run(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                self._serve(chunk)
        except BaseException as error:
            # A bug of ours. Whoever waits must hear of it; the traceback goes to threading.excepthook.
            self._shut(TransferFailed(f"a transfer thread died of {error!r}; restart the engine"))
            raise

    def _next(self) -> Chunk[ThreadTicket] | None:
        """Sleep until there is a chunk. None once closed."""
        with self._lock:
            while self._closed is None:
                chunk = self._ledger.take()
                if chunk is not None:
                    return chunk
                self._queued.wait()
            return None

    def _serve(self, chunk: Chunk[ThreadTicket]) -> None:
        ticket, start_s = chunk.entry, time.perf_counter()
        error: TransferFailed | None = TransferFailed("a transfer thread died while it moved this")
        try:
            error = self._move(chunk)
        finally:
            with self._lock:
                was_done = ticket.done
                self._ledger.finish(chunk, start_s, time.perf_counter(), error)
                if ticket.done and not was_done:
                    ticket.latch.release()
                if ticket.settled:
                    self._settled.notify_all()

    def _move(self, chunk: Chunk[ThreadTicket]) -> TransferFailed | None:
        """Copy one chunk, at the second try if need be; why it failed, if it did."""
        try:
            _copy(chunk)
            return None
        except OSError:
            with self._lock:
                self._ledger.num_retried += 1
        try:
            _copy(chunk)
            return None
        except OSError as error:
            return TransferFailed(_describe(chunk, error))


def _copy(chunk: Chunk[ThreadTicket]) -> None:
    """Bring the chunk's bytes in, without the GIL. Raises OSError."""
    source, start, end = chunk.entry.source, chunk.offset, chunk.offset + chunk.nbytes
    target = chunk.entry.target[start:end]
    if isinstance(source, FileSource):
        num_read = os.preadv(source.fd, [target.data], source.offset + start)
        if num_read != chunk.nbytes:
            raise OSError(errno.EIO, f"short read, {num_read} bytes")
    else:
        np.copyto(target, source.tensor.numpy()[start:end])  # one thread; torch's copy_ would take compute's cores


def _describe(chunk: Chunk[ThreadTicket], error: OSError) -> str:
    source = chunk.entry.source
    if isinstance(source, FileSource):
        place = f"{source.path}, {chunk.nbytes} bytes at offset {source.offset + chunk.offset}"
        return f"cannot read {place}, tried twice: {error}; check the disk, or delete the file to pack it again"
    return f"cannot copy {chunk.nbytes} bytes of host memory, tried twice: {error}"
