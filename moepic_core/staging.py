"""Staging: record-shaped buffers on the device that bytes arrive in before they are computed with or admitted.

A demand owns its buffer until the expert has been computed; a guess (prefetch) holds one until its layer comes. A
demand that finds no free buffer takes the newest guess away and never waits for one. A buffer whose transfer was
cancelled is reused only after the chunk in flight has settled. Starts no transfer itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .arena import Arena
from .transfer.base import Fence, Ticket


@dataclass(eq=False)
class StagingBuffer:
    buffer: Tensor  # bytes of one record
    layer: int = -1
    expert: int = -1
    guess: bool = False
    top: Ticket | None = None  # tickets of what travels into it; None: not sent here
    bottom: Ticket | None = None
    fence: Fence | None = None  # last computation that read it
    draining: list[Ticket] = field(default_factory=list)  # cancelled, perhaps one chunk still in flight

    def tickets(self) -> list[Ticket]:
        return [ticket for ticket in (self.top, self.bottom) if ticket is not None]


class Staging:
    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.record_bytes = 0
        self.free: list[StagingBuffer] = []
        self.demands: set[StagingBuffer] = set()
        self.guesses: dict[tuple[int, int], StagingBuffer] = {}  # (layer, expert), oldest first

    @property
    def num_buffers(self) -> int:
        return len(self.free) + len(self.demands) + len(self.guesses)

    def take_demand(self, layer: int, expert: int) -> StagingBuffer | None:
        """A free buffer for a demand; None when all hold demands or guesses (then take a guess back and ask again)."""
        if not self.free:
            return None
        buffer = self._take(layer, expert)
        self.demands.add(buffer)
        return buffer

    def take_guess(self, layer: int, expert: int) -> StagingBuffer | None:
        if not self.free:
            return None
        buffer = self._take(layer, expert)
        buffer.guess = True
        self.guesses[layer, expert] = buffer
        return buffer

    def find_guess(self, layer: int, expert: int) -> StagingBuffer | None:
        return self.guesses.get((layer, expert))

    def guess_came_true(self, buffer: StagingBuffer) -> None:
        del self.guesses[buffer.layer, buffer.expert]
        buffer.guess = False
        self.demands.add(buffer)

    def give_back(self, buffer: StagingBuffer, fence: Fence | None) -> None:
        """Computed with, or cancelled (its tickets must have been cancelled by the caller): free for the next."""
        if buffer.guess:
            del self.guesses[buffer.layer, buffer.expert]
        else:
            self.demands.remove(buffer)
        buffer.draining = [ticket for ticket in buffer.tickets() if not ticket.settled]
        buffer.layer, buffer.expert, buffer.guess = -1, -1, False
        buffer.top = buffer.bottom = None
        buffer.fence = fence if fence is not None else buffer.fence
        self.free.append(buffer)

    def resize(self, num_buffers: int, record_bytes: int) -> None:
        """Changes number or size; nothing may be taken. Frees before it allocates."""
        assert not self.demands and not self.guesses, (len(self.demands), len(self.guesses))
        while self.free and (len(self.free) > num_buffers or record_bytes != self.record_bytes):
            buffer = self.free.pop()
            self._settle(buffer)
            self.arena.free("staging", buffer.buffer)
        self.record_bytes = record_bytes
        while len(self.free) < num_buffers:
            self.free.append(StagingBuffer(self.arena.allocate("staging", record_bytes)))

    def check(self) -> None:
        held = {id(buffer) for buffer in (*self.free, *self.demands, *self.guesses.values())}
        assert len(held) == self.num_buffers, (len(held), self.num_buffers)
        assert all(buffer.guess and key == (buffer.layer, buffer.expert) for key, buffer in self.guesses.items())
        assert all(buffer.layer == -1 and not buffer.tickets() for buffer in self.free)
        assert not any(buffer.guess for buffer in self.demands)

    def _take(self, layer: int, expert: int) -> StagingBuffer:
        quiet = (place for place, buffer in enumerate(self.free) if all(ticket.settled for ticket in buffer.draining))
        buffer = self.free.pop(next(quiet, 0))
        self._settle(buffer)
        buffer.layer, buffer.expert = layer, expert
        return buffer

    @staticmethod
    def _settle(buffer: StagingBuffer) -> None:
        for ticket in buffer.draining:
            ticket.settle()
        buffer.draining = []
