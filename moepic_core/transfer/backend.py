"""What the backends have in common: one lock around one ledger, what readers take from it, and the end of all tickets.

`thread.py`, `emulated.py` and `cuda.py` add the moving itself. Methods that begin with an underscore want the lock
held.
"""

from __future__ import annotations

import threading
from typing import Generic

from ..errors import Cancelled, MoepicError, TransferFailed
from .base import StallEvent, TransferCounters, TransferEvent
from .ledger import E, Ledger


class Backend(Generic[E]):
    """See `Transfer`."""

    def __init__(self, chunk_bytes: int) -> None:
        self._ledger: Ledger[E] = Ledger(chunk_bytes)
        self._closed: MoepicError | None = None  # why nothing is taken any more
        self._lock = threading.RLock()  # a device may fail wherever it is asked

    @property
    def chunk_bytes(self) -> int:
        return self._ledger.chunk_bytes

    def start(self) -> None:
        """Here everything begins to move as soon as it can."""

    def drain_events(self) -> list[TransferEvent]:
        with self._lock:
            self._collect()
            return self._ledger.drain_events()

    def drain_stalls(self) -> list[StallEvent]:
        with self._lock:
            self._collect()
            return self._ledger.drain_stalls()

    def counters(self) -> TransferCounters:
        with self._lock:
            self._collect()
            return self._ledger.counters()

    def check(self) -> None:
        with self._lock:
            self._collect()
            self._ledger.check()

    def _collect(self) -> None:
        """Bring the books up to date, where nobody else does."""

    def _admit(self, ticket: E) -> None:
        """Raises why nothing is taken any more, if so."""
        if self._closed is not None:
            raise self._closed
        self._ledger.admit(ticket)

    def _end(self, error: TransferFailed | Cancelled) -> list[E]:
        """Nothing is taken any more, and every open ticket ends with `error`; returns them."""
        self._closed = self._closed or error
        return self._ledger.drop_all(error)
