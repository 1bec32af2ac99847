"""What is on a CUDA device's two copy streams, and when the device did it.

`cuda.py` decides what goes on them and calls everything but `put` under its own lock. Copies and stalls leave for the
ledger as soon as their events have come, with the device's own times; nothing here waits for a copy. Whatever a device
that has failed is asked raises RuntimeError, here as everywhere in torch.
"""

# torch.cuda is not annotated.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch

from ..errors import TransferFailed
from .base import Fence, MemorySource, Priority, Source
from .clocks import DeviceClock
from .ledger import Chunk, Entry, Ledger


class CudaEntry(Entry):
    """The books of a copy from host memory to a CUDA device."""

    def __init__(
        self, source: Source, destination: torch.Tensor, priority: Priority, tag: object, after: Fence | None
    ) -> None:
        super().__init__(source, destination, priority, tag, time.perf_counter())
        assert isinstance(source, MemorySource), f"{source} is no host memory; a CUDA device copies from nothing else"
        self.memory = source.tensor
        self.pinned = source.tensor.is_pinned()
        self.after = None if after is None else after.event
        self.issued_bytes = 0  # copies that are on a stream
        self.last_events: dict[Priority, torch.cuda.Event] = {}  # end of the latest copy on each stream


class Flight(NamedTuple):
    """A chunk on a stream, between two timing events."""

    chunk: Chunk[CudaEntry]
    start: torch.cuda.Event
    end: torch.cuda.Event


class Stall(NamedTuple):
    """The compute stream came to `reached` and goes on after `ends`."""

    ticket: CudaEntry
    reached: torch.cuda.Event
    ends: list[torch.cuda.Event]


class DeviceQueue:
    def __init__(self, device: torch.device) -> None:
        self._streams = {
            Priority.DEMAND: torch.cuda.Stream(device, priority=-1),
            Priority.PREFETCH: torch.cuda.Stream(device, priority=0),
        }
        self._flights: dict[Priority, deque[Flight]] = {priority: deque() for priority in Priority}  # in stream order
        self._stalls: deque[Stall] = deque()
        self._clock = DeviceClock(self._streams[Priority.DEMAND])

    def put(self, chunk: Chunk[CudaEntry]) -> Flight:
        """Enqueue one copy on its stream; blocks while pageable memory is read."""
        ticket, stream = chunk.entry, self._streams[chunk.priority]
        # The feeder sleeps on the end, it does not spin.
        flight = Flight(
            chunk, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True, blocking=True)
        )
        part = slice(chunk.offset, chunk.offset + chunk.nbytes)
        # Inference mode, because outside of it torch refuses to write to a buffer that was made inside of it.
        with torch.inference_mode(), torch.cuda.stream(stream):
            if ticket.after is not None:
                stream.wait_event(ticket.after)
            flight.start.record(stream)
            ticket.destination[part].copy_(ticket.memory[part], non_blocking=True)
            flight.end.record(stream)
        return flight

    def took_off(self, flight: Flight) -> None:
        self._flights[flight.chunk.priority].append(flight)

    def stalls(self, stall: Stall) -> None:
        self._stalls.append(stall)

    def ahead_of_a_guess(self, most_guesses: int) -> torch.cuda.Event | None:
        """What has to leave the link before another chunk of a guess may be put on it: any demand, and all but
        `most_guesses` - 1 chunks.
        """
        demands, guesses = self._flights[Priority.DEMAND], self._flights[Priority.PREFETCH]
        if demands:
            return demands[-1].end
        return guesses[0].end if len(guesses) >= most_guesses else None

    def collect(self, ledger: Ledger[CudaEntry]) -> None:
        """Tell `ledger` what has landed, and for how long compute has stalled."""
        clock = self._clock
        for flights in self._flights.values():
            while flights and flights[0].end.query():
                chunk, start, end = flights.popleft()
                ledger.finish(chunk, clock.host_s(start), clock.host_s(end))
        while self._stalls and self._stalls[0].reached.query() and all(end.query() for end in self._stalls[0].ends):
            ticket, reached, ends = self._stalls.popleft()
            ledger.stall(ticket, clock.host_s(reached), max(clock.host_s(end) for end in ends))
        if not self._stalls and not any(self._flights.values()):
            clock.renew()

    def abandon(self, ledger: Ledger[CudaEntry], error: TransferFailed) -> None:
        """The device has failed, and no event will ever come: all that is on it has failed too."""
        now_s = time.perf_counter()
        for flights in self._flights.values():
            while flights:
                ledger.finish(flights.popleft().chunk, now_s, now_s, error)
        self._stalls.clear()

    def synchronize(self) -> None:
        """Wait until nothing is on the streams any more."""
        for stream in self._streams.values():
            stream.synchronize()
