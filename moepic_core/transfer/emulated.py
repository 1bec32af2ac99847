"""Transfers over an emulated link: host memory is copied, and has arrived when a link of that bandwidth had brought it.

What is on the link, and from when to when, follows from what was asked and when: demands before guesses, chunk after
chunk. So nobody keeps time: whoever asks brings the books up to now first, and whoever waits sleeps until the chunk on
the link has come. One thread makes the copies, ahead of the link; where this machine copies slower than the link
would, the link waits for it. It wakes when somebody waits or says `start`, because Python that runs in one thread is
time that the computing one waits for (docs/LOG.md). Compute is synchronous here, so fences are empty.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from operator import attrgetter

import torch

from ..errors import Cancelled, TransferFailed
from .backend import Backend
from .base import Fence, MemorySource, Priority, Source, Ticket
from .clocks import sleep_precisely
from .ledger import Chunk, Entry

CHUNK_BYTES = 2 << 20  # a demand waits for the one on the link: 80 µs at 25 GB/s
_POLL_S = 0.02  # how long a stop may go unnoticed by a thread that waits for a ticket
_SETTLE_POLL_S = 50e-6


class EmulatedTicket(Entry):
    def __init__(
        self, transfer: EmulatedTransfer, source: Source, destination: torch.Tensor, priority: Priority, tag: object
    ) -> None:
        super().__init__(source, destination, priority, tag, time.perf_counter())
        assert isinstance(source, MemorySource), f"{source} is no host memory; an emulated link copies nothing else"
        self.transfer = transfer
        self.addresses = destination.data_ptr(), source.tensor.data_ptr()
        self.begun_bytes = 0  # that are copied or being copied
        self.copied_s: list[float] = []  # when each chunk was copied
        self.latch = threading.Lock()  # held until the last chunk is copied, or will never be
        self.latch.acquire()

    @property
    def done(self) -> bool:
        if not self.ended:
            self.transfer.collect()
        return self.ended

    @property
    def settled(self) -> bool:
        if not self.at_rest:
            self.transfer.collect()
        return self.at_rest and not self.transfer.copies(self)

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        start_s = end_s = time.perf_counter()
        while not self.done:
            if cancelled is not None and cancelled():
                raise Cancelled("stopped while waiting for a transfer")
            if self.latch.acquire(timeout=_POLL_S):
                self.latch.release()
                self.transfer.sleep()
            end_s = time.perf_counter()
        self.transfer.stall(self, start_s, end_s)
        self.raise_error()
        return end_s - start_s

    def settle(self) -> None:
        while not self.settled:
            time.sleep(_SETTLE_POLL_S)


class EmulatedTransfer(Backend[EmulatedTicket]):
    """See `Transfer`. Sources are `MemorySource` only."""

    def __init__(self, bytes_per_s: float, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(chunk_bytes)
        self._bytes_per_s = bytes_per_s
        self._on_link: Chunk[EmulatedTicket] | None = None
        self._start_s = self._end_s = 0.0  # of the latest chunk on the link
        self._uncopied: list[EmulatedTicket] = []  # of which chunks still have to be copied
        self._copying: EmulatedTicket | None = None
        self._bell = threading.Lock()  # its release wakes the copier
        self._bell.acquire()
        self._asleep = False
        # A daemon, because a program that dies without `close` must not hang at exit.
        self._copier = threading.Thread(target=self._run, name="moepic-transfer-copier", daemon=True)
        self._copier.start()

    def submit(
        self,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object = None,
        after: Fence | None = None,
    ) -> EmulatedTicket:
        ticket = EmulatedTicket(self, source, destination, priority, tag)
        with self._lock:
            self._collect()  # whose turn has come by now is not overtaken
            self._admit(ticket)
            self._uncopied.append(ticket)
        return ticket

    def start(self) -> None:
        if self._asleep and self._uncopied:
            with self._lock:
                self._wake()

    def promote(self, ticket: Ticket) -> None:
        assert isinstance(ticket, EmulatedTicket), ticket
        with self._lock:
            self._collect()
            self._ledger.promote(ticket)

    def cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, EmulatedTicket), ticket
        with self._lock:
            self._collect()
            if self._ledger.drop(ticket, Cancelled("this transfer was cancelled")):
                self._forget(ticket)

    def fence(self) -> Fence:
        return Fence()

    def collect(self) -> None:
        """Bring the books up to now, for somebody who wants a ticket to end."""
        self.start()
        with self._lock:
            self._collect()

    def copies(self, ticket: EmulatedTicket) -> bool:
        """Whether a chunk of `ticket` is being copied now."""
        return self._copying is ticket

    def sleep(self) -> None:
        """Until the chunk on the link has come."""
        sleep_precisely(min(max(self._end_s - time.perf_counter(), 0), _POLL_S))

    def stall(self, ticket: EmulatedTicket, start_s: float, end_s: float) -> None:
        with self._lock:
            self._ledger.stall(ticket, start_s, end_s)

    def close(self) -> None:
        self._shut(Cancelled("the transfer backend was closed"))
        self._copier.join()

    def _shut(self, error: TransferFailed | Cancelled) -> None:
        with self._lock:
            self._collect()
            for ticket in self._end(error):
                self._forget(ticket)
            self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self._bell.release()

    def _forget(self, ticket: EmulatedTicket) -> None:
        """What is not copied yet of a ticket that has ended will never be."""
        if ticket in self._uncopied:
            self._uncopied.remove(ticket)
            ticket.latch.release()

    def _collect(self) -> None:
        """Everything that the link has brought or begun by now is in the books."""
        now_s = time.perf_counter()
        while self._clear_link(now_s) and self._end_s <= now_s:
            chunk = self._on_link = self._ledger.take()
            if chunk is None:
                return
            # From one end to the next, never from now: nobody has to look in time.
            self._start_s = max(self._end_s, chunk.entry.submitted_s)
            self._end_s = self._start_s + chunk.nbytes / self._bytes_per_s

    def _clear_link(self, now_s: float) -> bool:
        """Books the chunk on the link if it has come by now; whether there is none any more."""
        chunk = self._on_link
        if chunk is None:
            return True
        ticket, place = chunk.entry, chunk.offset // self._ledger.chunk_bytes
        if ticket.ended:  # it was dropped, and nobody wants to wait for the rest of its time
            self._ledger.finish(chunk, min(self._start_s, now_s), min(self._end_s, now_s))
        elif self._end_s <= now_s and place < len(ticket.copied_s):
            self._ledger.finish(chunk, self._start_s, max(self._end_s, ticket.copied_s[place]))
        else:
            return False
        self._on_link = None
        return True

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                ctypes.memmove(*piece)  # without the GIL, and in one thread; torch's copy_ would take compute's cores
        except BaseException as error:
            # A bug of ours. Whoever waits must hear of it; the traceback goes to threading.excepthook.
            self._copying = None
            self._shut(TransferFailed(f"a transfer thread died of {error!r}; restart the engine"))
            raise

    def _next(self) -> tuple[int, int, int] | None:
        """Notes that the last chunk is copied, and sleeps until there is another: `memmove`'s arguments.

        None once closed.
        """
        while True:
            with self._lock:
                self._note_copied()
                if self._closed is not None:
                    return None
                if self._uncopied:
                    return self._begin(min(self._uncopied, key=attrgetter("priority")))
                self._asleep = True
            self._bell.acquire()

    def _note_copied(self) -> None:
        ticket, self._copying = self._copying, None
        if ticket is not None:
            ticket.copied_s.append(time.perf_counter())
            if ticket.begun_bytes == ticket.nbytes:
                ticket.latch.release()

    def _begin(self, ticket: EmulatedTicket) -> tuple[int, int, int]:
        start = ticket.begun_bytes
        nbytes = min(ticket.nbytes - start, self._ledger.chunk_bytes)
        ticket.begun_bytes += nbytes
        if ticket.begun_bytes == ticket.nbytes:
            self._uncopied.remove(ticket)
        self._copying = ticket
        destination, source = ticket.addresses
        return destination + start, source + start, nbytes
