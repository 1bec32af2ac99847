"""What memory, bus and disk carry when nothing else is asked of them: the yardsticks of floors and shares of a link.

Benchmarks measure them in the run, and on the disk, that they judge. Direct reads need a file system with O_DIRECT.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moepic_core.transfer.thread import CHUNK_BYTES
from moepic_core.units import ALIGNMENT_BYTES

READ_BYTES = 1 << 30  # of a file, at most: about a second
COPY_BYTES = 1 << 28


def disk_bytes_per_s(path: Path) -> float:
    """Direct reads of the first GiB of `path`, two at a time: more threads carry no more."""
    nbytes = min(READ_BYTES, path.stat().st_size // CHUNK_BYTES * CHUNK_BYTES)
    assert nbytes, f"{path} has {path.stat().st_size} bytes, less than one chunk of {CHUNK_BYTES}"
    destination = memoryview(aligned(32 * CHUNK_BYTES).numpy())
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return nbytes / seconds(lambda: read_raw(fd, nbytes, destination))
    finally:
        os.close(fd)


def read_raw(fd: int, nbytes: int, destination: memoryview, num_threads: int = 2) -> None:
    """The first `nbytes` of a file in whole chunks, by threads that do nothing else. A short `destination` is filled
    again and again.
    """
    offsets = iter(range(0, nbytes, CHUNK_BYTES))
    lock = threading.Lock()

    def read() -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            start = offset % len(destination)
            os.preadv(fd, [destination[start : start + CHUNK_BYTES]], offset)

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bus_bytes_per_s(device: torch.device) -> float:
    """One copy of pinned memory to a GPU, the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    destination = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        destination.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return COPY_BYTES / min(seconds(copy) for _ in range(5))


def memory_bytes_per_s(device: torch.device) -> float:
    """Reading the device's memory: the best of ten sums over 1 GB."""
    data = torch.ones(1 << 28, dtype=torch.float32, device=device)
    return data.numel() * 4 / min(seconds(lambda: data.sum().item()) for _ in range(10))


def seconds(action: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def aligned(nbytes: int) -> torch.Tensor:
    """Memory for direct reads, touched before."""
    memory = torch.zeros(nbytes + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + nbytes]


def read_ahead_kb(path: Path) -> int | None:
    """How much more than asked for the kernel reads of the block device under `path`; None where it does not say."""
    device = path.stat().st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (setting / "queue", setting.resolve().parent / "queue"):  # a disk, a partition of one
        if (place / "read_ahead_kb").exists():
            return int((place / "read_ahead_kb").read_text())
    return None


def forget_pages(*paths: Path) -> None:
    """Drops files, or the files in folders, from the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else path.iterdir():
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
