"""One harness per transfer backend, so that one suite (`test_transfer.py`) runs over all of them.

A `Link` makes backends, sources and destinations of its kind, and lets copies fail on request. `slow` backends move a
chunk in about a millisecond, so that a test can act while much is still queued.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
from null_transfer import NullTransfer

from moepic_core.transfer.base import FileSource, MemorySource, Source, Transfer
from moepic_core.transfer.cuda import CudaTransfer
from moepic_core.transfer.emulated import EmulatedTransfer
from moepic_core.transfer.pinning import pin
from moepic_core.transfer.thread import ThreadTransfer
from moepic_core.units import ALIGNMENT_BYTES, align

CHUNK_BYTES = 64 << 10
SLOW_BYTES_PER_S = 64e6


class Link:
    """Host memory to host memory through the null backend; the other kinds change what differs."""

    chunk_bytes = CHUNK_BYTES
    granule = 1  # sizes are multiples of it

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.copies_to_fail = 0.0
        self.transfers: list[Transfer] = []
        self.resources = contextlib.ExitStack()  # freed after the backends that use them

    def make(self, slow: bool = False) -> Transfer:
        transfer = self.build(slow)
        self.transfers.append(transfer)
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
        for transfer in self.transfers:
            transfer.close()
        self.resources.close()


class RandomNull(Link):
    def build(self, slow: bool) -> Transfer:
        return NullTransfer(seed=7, chunk_bytes=self.chunk_bytes)


class Emulated(Link):
    def build(self, slow: bool) -> Transfer:
        return EmulatedTransfer(SLOW_BYTES_PER_S if slow else 2e9, self.chunk_bytes)


class ThreadMemory(Link):
    num_workers = 1

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        self._device = threading.Lock()  # moves one chunk at a time
        self._bytes_per_s = math.inf
        patch.setattr(np, "copyto", self._slowed(np.copyto, lambda target, source: target.nbytes))

    def build(self, slow: bool) -> Transfer:
        self._bytes_per_s = SLOW_BYTES_PER_S if slow else math.inf
        return ThreadTransfer(self.num_workers, self.chunk_bytes)

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.copies_to_fail = num_copies

    def _slowed(self, call: Callable[..., object], size: Callable[..., int]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            if self.copies_to_fail > 0:
                self.copies_to_fail -= 1
                raise OSError(errno.EIO, "as the test wished")
            with self._device:
                time.sleep(size(*args) / self._bytes_per_s)
            return call(*args)

        return wrapped


class ThreadDisk(ThreadMemory):
    num_workers = 2
    flags = os.O_RDONLY

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        patch.setattr(os, "preadv", self._slowed(os.preadv, lambda fd, targets, offset: targets[0].nbytes))
        self._names = itertools.count()

    def source(self, data: torch.Tensor) -> Source:
        path = self.folder / f"packed-{next(self._names)}"
        path.write_bytes(b"x" * ALIGNMENT_BYTES + data.numpy().tobytes())
        fd = os.open(path, self.flags)
        self.resources.callback(os.close, fd)
        return FileSource(fd, ALIGNMENT_BYTES, data.numel(), str(path), self.flags != os.O_RDONLY)


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
    pinned = True

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        self.fake = fake_cuda.install(patch)
        self.fake.pinned = self.pinned
        self.resources.callback(self.fake.stop)

    def build(self, slow: bool) -> Transfer:
        self.fake.bytes_per_s = SLOW_BYTES_PER_S if slow else math.inf
        return CudaTransfer(torch.device("cpu"), self.chunk_bytes)

    def read(self, destination: torch.Tensor) -> torch.Tensor:
        self.fake.compute.synchronize()
        return destination.clone()

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.fake.copies_to_fail = num_copies


class SimulatedPageable(SimulatedCuda):
    pinned = False


class Cuda(Link):
    """The real thing. Nothing slows it down, so what has to be slow is big."""

    chunk_bytes = 4 << 20

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch, folder)
        patch.setattr(torch.Tensor, "copy_", self._flaky(torch.Tensor.copy_))

    def build(self, slow: bool) -> Transfer:
        return CudaTransfer(torch.device("cuda"), self.chunk_bytes)

    def source(self, data: torch.Tensor) -> Source:
        memory = Link.buffer(self, align(data.numel()))  # whole pages, because a page cannot be pinned twice
        memory[: data.numel()] = data
        pinned = pin(memory)
        assert pinned.error is None, pinned.error
        self.resources.callback(pinned.release)
        return MemorySource(memory[: data.numel()])

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")

    def read(self, destination: torch.Tensor) -> torch.Tensor:
        return destination.cpu()

    def fail(self, transfer: Transfer, num_copies: float = math.inf) -> None:
        self.copies_to_fail = num_copies

    def _flaky(self, copy: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking and self.copies_to_fail > 0:
                self.copies_to_fail -= 1
                raise RuntimeError("CUDA error: as the test wished")
            return copy(destination, source, non_blocking=non_blocking)

        return wrapped


class PageableCuda(Cuda):
    def source(self, data: torch.Tensor) -> Source:
        return MemorySource(data)


LINKS = {
    "null": Link,
    "null-random": RandomNull,
    "memory": ThreadMemory,
    "emulated": Emulated,
    "disk": ThreadDisk,
    "direct": ThreadDirect,
    "cuda-simulated": SimulatedCuda,
    "cuda-simulated-pageable": SimulatedPageable,
    "cuda": Cuda,
    "cuda-pageable": PageableCuda,
}


def link_params(*names: str) -> list[object]:
    """Names for `pytest.mark.parametrize`; the real device only where there is one (see `conftest.py`)."""
    return [pytest.param(name, marks=pytest.mark.gpu if issubclass(LINKS[name], Cuda) else ()) for name in names]


def data_of(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Random bytes, never the same twice in a row as long as seeds differ."""
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
