"""The contract of everything that moves bytes toward the device.

`residency` submits copies and waits on tickets; a host store makes the sources; `thread.py`, `emulated.py` and
`cuda.py` are the backends, and `tests/null_transfer.py` another that tests drive by hand. Every asynchronous copy has
a ticket: until `wait` returned, the destination holds nothing that may be read, and until the ticket is settled it may
not be reused. Copies run in chunks, so that a demand overtakes what is queued of a guess. Nothing here knows what an
expert is, and nothing ever travels back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from ..units import ALIGNMENT_BYTES


class Priority(IntEnum):
    """Why bytes travel, in the order of service."""

    DEMAND = 0  # needed now
    PREFETCH = 1  # guessed


@dataclass(frozen=True, eq=False)
class MemorySource:
    """Bytes in host memory, pinned where a CUDA device shall copy them without help of the CPU."""

    tensor: torch.Tensor  # uint8 [nbytes], on the CPU, contiguous, immutable while any ticket on it is unsettled

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()


@dataclass(frozen=True)
class FileSource:
    """A byte range of an open file. Offset, size and destination are multiples of 4096 when `direct`."""

    fd: int  # stays open while any ticket on it is unsettled
    offset: int
    nbytes: int
    path: str  # for messages only
    direct: bool  # `fd` was opened with O_DIRECT


Source = MemorySource | FileSource


@dataclass(frozen=True)
class Fence:
    """A point in what the compute side has issued; empty where compute is synchronous and so has always finished."""

    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Block until the device has passed this point. For measuring; serving never waits like this."""
        if self.event is not None:
            self.event.synchronize()


class TransferEvent(NamedTuple):
    """One chunk's time on the link. `nbytes` is 0 if the chunk failed."""

    tag: object
    priority: Priority
    start_s: float  # time.perf_counter
    end_s: float
    nbytes: int


class StallEvent(NamedTuple):
    """For this long compute had nothing to do but wait for a ticket; on CUDA by the device's clock."""

    tag: object
    start_s: float  # time.perf_counter
    end_s: float


@dataclass(frozen=True)
class TransferCounters:
    """Totals since the backend was made."""

    submitted: int  # tickets; = succeeded + failed + cancelled + those still open
    succeeded: int
    failed: int
    cancelled: int
    retried: int  # chunks that failed once
    demand_bytes: int  # that arrived
    prefetch_bytes: int
    unpinned_bytes: int  # that left pageable memory for a CUDA device: slow, and worth a warning
    busy_s: float  # union of the intervals in which at least one chunk was in flight
    stalled_s: float  # time for which compute had nothing to do but wait for a ticket


class Ticket(Protocol):
    """One submitted copy."""

    @property
    def tag(self) -> object: ...

    @property
    def priority(self) -> Priority: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def taken_bytes(self) -> int:
        """Bytes that are under way or have arrived: all of `nbytes`, unless it was cancelled or is still queued."""

    @property
    def done(self) -> bool:
        """Data is in the destination, or the ticket failed or was cancelled. Never blocks."""

    @property
    def settled(self) -> bool:
        """Done, and no chunk is in flight: from now on nothing writes to the destination. Never blocks."""

    def wait(self, cancelled: Callable[[], bool] | None = None) -> float:
        """Return as soon as the caller may use the data; seconds for which this thread was blocked.

        On the CPU this blocks until the data has arrived. On CUDA it makes the current stream wait, and blocks only
        while chunks are still queued in host memory; how long the stream then stalls shows in `drain_stalls`.
        `cancelled` is asked about every 20 ms; once it says yes, Cancelled is raised (the ticket itself lives on:
        call `Transfer.cancel`). Raises TransferFailed if the copy failed, Cancelled if it was cancelled.
        Waiting promotes nothing: a guess that is needed should be promoted first.
        """

    def settle(self) -> None:
        """Block until settled: after `cancel` or a failure, for at most the chunks in flight."""


class Transfer(Protocol):
    """Moves bytes toward the device. All methods but `close` may be called from any thread and return at once."""

    @property
    def chunk_bytes(self) -> int:
        """The most bytes that a demand may have to wait for."""

    def submit(
        self,
        source: Source,
        destination: torch.Tensor,
        priority: Priority,
        tag: object = None,
        after: Fence | None = None,
    ) -> Ticket:
        """Queue a copy of all of `source` into `destination` (uint8 [source.nbytes], contiguous, on the device).

        Demands are served first in, first out, and before any guess; likewise guesses among themselves. `tag` comes
        back in events. Nothing is written before the compute side has passed `after`.
        """

    def start(self) -> None:
        """Copies that need the CPU may begin: the caller is about to compute, and to let go of the interpreter's lock.

        Needed only so that they begin while nobody waits for a ticket or asks about one; costs next to nothing.
        """

    def promote(self, ticket: Ticket) -> None:
        """A guess turned out to be needed: its remaining chunks queue up as demand. No effect on other tickets."""

    def cancel(self, ticket: Ticket) -> None:
        """Drop the chunks that have not started. No effect on a ticket that is done."""

    def fence(self) -> Fence:
        """Everything that the compute side has issued so far."""

    def drain_events(self) -> list[TransferEvent]:
        """Chunks that finished since the last call, at most the latest 65,536."""

    def drain_stalls(self) -> list[StallEvent]:
        """Waits for tickets that ended since the last call, at most the latest 65,536."""

    def counters(self) -> TransferCounters: ...

    def check(self) -> None:
        """Assert that every ticket and byte is accounted for; the message has both sides."""

    def close(self) -> None:
        """Cancel what is pending and stop all threads; never hangs, and a second call does nothing."""


def check_request(source: Source, destination: torch.Tensor) -> None:
    """Assert what `Transfer.submit` asks of its caller; every backend calls it first."""
    assert destination.dtype == torch.uint8, f"destination is {destination.dtype}, must be uint8"
    assert destination.dim() == 1, f"destination has {destination.dim()} dimensions, must have 1"
    assert destination.is_contiguous(), f"destination has stride {destination.stride()}, must be contiguous"
    assert destination.numel() == source.nbytes > 0, f"{source.nbytes} bytes into {destination.numel()}; 0 is no copy"
    if isinstance(source, MemorySource):
        tensor = source.tensor
        assert tensor.dtype == torch.uint8, f"source is {tensor.dtype}, must be uint8"
        assert tensor.dim() == 1, f"source has {tensor.dim()} dimensions, must have 1"
        assert tensor.is_contiguous(), f"source has stride {tensor.stride()}, must be contiguous"
    elif source.direct:
        for name, value in (
            ("offset", source.offset),
            ("size", source.nbytes),
            ("destination address", destination.data_ptr()),
        ):
            assert value % ALIGNMENT_BYTES == 0, f"{name} {value} is no multiple of {ALIGNMENT_BYTES}"
