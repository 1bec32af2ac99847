"""All device bytes, counted against one hard budget.

Everything that the engine puts on the device is allocated or reserved here by kind, so "accounted bytes never exceed
the budget" is checked at each allocation and nowhere else. Buffers are separate allocations, one per slot: shrinking a
cache is dropping buffers, growing is allocating more, and nothing that stays is moved. On CUDA that wants torch's
expandable segments, which launch.py and `cli` switch on: in fixed ones of 20 MiB only two slots of 7 MiB have room.
Does not know what buffers hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import OutOfRoom
from .packing import aligned_bytes
from .units import align, format_bytes

_FULL = (  # in what torch says when not its own allocator finds a memory full
    "can't allocate memory",  # of the host
    "CUDA error: out of memory",  # the driver, for streams, events and kernels
    "CUBLAS_STATUS_ALLOC_FAILED",
)
KINDS = ("resident", "kv", "workspace", "staging", "cache")


class Arena:
    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.bytes_by_kind = dict.fromkeys(KINDS, 0)
        self.peak_bytes = 0
        self._freed = False  # something that `trim` can give back
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def used_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    def reserve(self, kind: str, nbytes: int) -> None:
        """Counts `nbytes` that somebody else allocates (weights, KV). Raises OutOfRoom past the budget."""
        left = self.budget_bytes - self.used_bytes
        if nbytes > left:
            raise OutOfRoom(
                f"the device budget of {format_bytes(self.budget_bytes)} has {format_bytes(left)} left, "
                f"{format_bytes(nbytes)} more is needed for {kind}; raise the budget or shorten the context"
            )
        self.bytes_by_kind[kind] += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, kind: str, nbytes: int) -> None:
        assert nbytes <= self.bytes_by_kind[kind], (kind, nbytes, self.bytes_by_kind[kind])
        self.bytes_by_kind[kind] -= nbytes

    def allocate(self, kind: str, nbytes: int) -> Tensor:
        """A byte buffer `[align(nbytes)]` at an aligned address. Raises OutOfRoom when budget or machine is full."""
        nbytes = align(nbytes)
        self.reserve(kind, nbytes)
        try:
            return _allocate(nbytes, self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain RuntimeError from the CPU allocator
            self.release(kind, nbytes)
            if not is_out_of_memory(error):
                raise
            raise OutOfRoom(
                f"the machine refused {format_bytes(nbytes)} for {kind} although the budget has room; "
                f"another program may hold the memory; lower the budget"
            ) from error

    def free(self, kind: str, buffer: Tensor) -> None:
        """Stops counting `buffer`; its memory is free again when the caller drops the last reference."""
        self.release(kind, buffer.numel())
        self._freed = True

    def trim(self) -> None:
        """Hands freed memory back to the machine, for other programs and for buffers of other sizes.

        Torch keeps what was freed on a CUDA device, in blocks of the old sizes, so a lowered budget would free nothing
        and slots of a new size would come on top. Waits for the device; does nothing unless something was freed.
        """
        if self._freed and self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._freed = False

    @property
    def peak_device_bytes(self) -> int:
        """The most device memory since this was made: accounted on the CPU, as the allocator saw it on CUDA."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self.peak_bytes

    def check(self) -> None:
        assert self.used_bytes <= self.budget_bytes, (self.bytes_by_kind, self.budget_bytes)
        assert all(count >= 0 for count in self.bytes_by_kind.values()), self.bytes_by_kind


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch said that a memory, of the device or of the host, is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL)


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)  # the allocator's own alignment is enough
    return aligned_bytes(nbytes)
