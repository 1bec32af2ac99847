"""One harness per transfer backend, so that one suite (`test_transfer.py`) runs over all of them.

A `Link` makes backends, sources and destinations of its kind, and lets copies fail on request. `slow` backends move a
chunk in about a millisecond, so that a test can act while much is still queued.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
from null_transfer import NullTransfer

from moepic_core.transfer.base import ALIGNMENT_BYTES, FileSource, MemorySource, Source, Transfer
from moepic_core.transfer.cuda import CudaTransfer
from moepic_core.transfer.pinning import Pinned, pin
from moepic_core.transfer.thread import ThreadTransfer

CHUNK_BYTES = 64 << 10
SLOW_BYTES_PER_S = 64e6


class Link:
    """Host memory to host memory through the null backend; the other kinds change what differs."""

    chunk_bytes = CHUNK_BYTES
    num_at_once = 1  # chunks that a later demand cannot overtake any more
    granule = 1  # sizes are multiples of it

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch = patch
        self.folder = folder
        self.copies_to_fail = 0.0
        self._closers: list[Callable[[], None]] = []

    def make(self, slow: bool = False) -> Transfer:
        transfer = self.build(slow)
        self._closers.append(transfer.close)
        return transfer

    def build(self, slow: bool) -> Transfer:
        return NullTransfer(chunk_bytes=self.chunk_bytes)

    def source(self, data: torch.Tensor) -> Source:
        return MemorySource(data)

    def buffer(self, nbytes: int) -> torch.Tensor:
        memory = torch.zeros(nbytes + ALIGNMENT_BYTES, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT_BYTES
        return memory[start : start + nbytes]

    def read(self, destination: torch.Tensor) -> torch.Tensor:
        return destination.clone()

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        """The next copies fail; 0 heals the link."""
        assert isinstance(transfer, NullTransfer)
        transfer.failures = {None: num_copies}

    def close(self) -> None:
        for closer in self._closers:
            closer()


class RandomNull(Link):
    def build(self, slow: bool) -> Transfer:
        return NullTransfer(seed=7, chunk_bytes=self.chunk_bytes)


class ThreadMemory(Link):
    rate_bytes_per_s: float | None = None

    def build(self, slow: bool) -> Transfer:
        self.patch.setattr(np, "copyto", self._flaky(np.copyto))
        rate = SLOW_BYTES_PER_S if slow else self.rate_bytes_per_s
        return ThreadTransfer(num_workers=self.num_at_once, rate_bytes_per_s=rate, chunk_bytes=self.chunk_bytes)

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.copies_to_fail = num_copies

    def _flaky(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            if self.copies_to_fail > 0:
                self.copies_to_fail -= 1
                raise OSError(errno.EIO, "as the test wished")
            return call(*args)

        return wrapped


class ThreadEmulated(ThreadMemory):
    rate_bytes_per_s = 2e9


class ThreadDisk(ThreadMemory):
    num_at_once = 2
    flags = os.O_RDONLY

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        patch.setattr(os, "preadv", self._flaky(os.preadv))
        self._names = itertools.count()

    def source(self, data: torch.Tensor) -> Source:
        path = self.folder / f"packed-{next(self._names)}"
        path.write_bytes(b"x" * ALIGNMENT_BYTES + data.numpy().tobytes())
        fd = os.open(path, self.flags)
        self._closers.append(lambda: os.close(fd))
        return FileSource(fd, ALIGNMENT_BYTES, data.numel(), str(path), self.flags != os.O_RDONLY)

    def close(self) -> None:
        super().close()  # backends first: they were made before the files that they read


class ThreadDirect(ThreadDisk):
    granule = ALIGNMENT_BYTES
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        try:
            self.source(torch.zeros(ALIGNMENT_BYTES, dtype=torch.uint8))
        except OSError:
            pytest.skip(f"{folder} has no direct I/O")


class SimulatedCuda(Link):
    num_at_once = 2
    pinned = True

    def build(self, slow: bool) -> Transfer:
        self.fake = fake_cuda.install(self.patch, SLOW_BYTES_PER_S if slow else 1e12)
        self.fake.pinned = self.pinned
        self._closers.insert(0, self.fake.stop)
        return CudaTransfer(torch.device("cpu"), self.chunk_bytes)

    def read(self, destination: torch.Tensor) -> torch.Tensor:
        self.fake.compute.synchronize()
        return destination.clone()

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.fake.copies_to_fail = num_copies

    def close(self) -> None:
        self._closers.reverse()  # the backend before its device
        super().close()


class SimulatedPageable(SimulatedCuda):
    pinned = False


class Cuda(Link):
    """The real thing. Nothing slows it down, so what has to be slow is big."""

    chunk_bytes = 4 << 20
    num_at_once = 2

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        self._pins: list[Pinned] = []
        self._real_copy = torch.Tensor.copy_
        patch.setattr(torch.Tensor, "copy_", self._copy)

    def build(self, slow: bool) -> Transfer:
        return CudaTransfer(torch.device("cuda"), self.chunk_bytes)

    def source(self, data: torch.Tensor) -> Source:
        pinned = pin(data)
        assert pinned.error is None, pinned.error
        self._pins.append(pinned)
        return MemorySource(data)

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")

    def read(self, destination: torch.Tensor) -> torch.Tensor:
        return destination.cpu()

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.copies_to_fail = num_copies

    def close(self) -> None:
        super().close()
        for pinned in self._pins:
            pinned.release()

    def _copy(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking and self.copies_to_fail > 0:
            self.copies_to_fail -= 1
            raise RuntimeError("CUDA error: as the test wished")
        return self._real_copy(destination, source, non_blocking=non_blocking)


class PageableCuda(Cuda):
    def source(self, data: torch.Tensor) -> Source:
        return MemorySource(data)


LINKS = {
    "null": Link,
    "null-random": RandomNull,
    "memory": ThreadMemory,
    "emulated": ThreadEmulated,
    "disk": ThreadDisk,
    "direct": ThreadDirect,
    "cuda-simulated": SimulatedCuda,
    "cuda-simulated-pageable": SimulatedPageable,
    "cuda": Cuda,
    "cuda-pageable": PageableCuda,
}
