"""The pieces of one layer in the order in which they can be computed: what is here first, then each as it arrives.

`step` puts in what it demanded and hands out what comes next. Knows tickets, but not what they move, nor what becomes
of slots and buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .device_cache import Slot
from .staging import StagingBuffer
from .transfer.base import Ticket


class Piece(NamedTuple):
    """One segment, ready to compute with."""

    expert: int
    start_row: int
    weights: Tensor  # [rows, matrices, hidden]


class Need:
    """One needed expert while its layer runs."""

    __slots__ = ("expert", "left", "slot", "staged", "top_ticket", "was_guess")

    def __init__(self, expert: int) -> None:
        self.expert = expert
        self.slot: Slot | None = None
        self.staged: StagingBuffer | None = None
        self.top_ticket: Ticket | None = None  # of a demand that travels straight into the slot
        self.was_guess = False
        self.left = 0  # pieces not computed yet


class Pending(NamedTuple):
    """One segment of a needed expert, not computed yet."""

    need: Need
    start_row: int
    tickets: Sequence[Ticket]  # all must be done before its weights may be read

    def arrived(self) -> bool:
        return all(ticket.done for ticket in self.tickets)


class PieceQueue:
    """What is pending. Falsy when nothing is."""

    def __init__(self) -> None:
        self._ready: deque[Pending] = deque()
        self._arriving: list[Pending] = []
        self.waited = False  # for any ticket

    def __bool__(self) -> bool:
        return bool(self._ready or self._arriving)

    def add(self, pending: Pending) -> None:
        pending.need.left += 1
        (self._arriving if pending.tickets else self._ready).append(pending)

    def next(self, cancelled: Callable[[], bool]) -> Pending:
        """Takes out the next one whose data is here; waits only when there is none. On CUDA it is the device that
        waits.
        """
        if self._ready:
            return self._ready.popleft()
        position = next((place for place, pending in enumerate(self._arriving) if pending.arrived()), 0)
        self.waited = True
        for ticket in self._arriving[position].tickets:
            ticket.wait(cancelled)
        return self._arriving.pop(position)
