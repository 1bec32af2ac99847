"""Bandwidth of each transfer backend against the plainest way to move the same bytes, measured in the same rounds.

`python -m benchmarks.transfer [--device cpu|cuda] [--mb 512] [--rounds 5] [--folder DIR]`. On the CPU: host memory
against one `numpy.copyto`, emulated links against their nominal bandwidth, the disk (O_DIRECT) against two threads
that only read. On CUDA: pinned and pageable memory against one whole copy. Then the time from submit to data, alone
and while guesses fill the queue. Data are random; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Rounds, interleave, report
from benchmarks.raw_rates import aligned, read_raw, seconds
from moepic_core.transfer.base import FileSource, MemorySource, Priority, Source, Transfer
from moepic_core.transfer.cuda import CudaTransfer
from moepic_core.transfer.emulated import EmulatedTransfer
from moepic_core.transfer.pinning import pin
from moepic_core.transfer.thread import ThreadTransfer

TICKET_BYTES = 16 << 20  # about one expert
SMALL_BYTES = 4096
EMULATED_BYTES_PER_S = (2e9, 8e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mb", type=int, default=512, help="bytes moved per variant and round (default: 512)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the disk is measured (default: the temporary folder)")
    arguments = parser.parse_args()
    nbytes = max(1, arguments.mb * 2**20 // TICKET_BYTES) * TICKET_BYTES
    with contextlib.ExitStack() as stack:
        if arguments.device == "cuda":
            bandwidths, latencies = cuda_variants(stack, nbytes)
        else:
            bandwidths, latencies = cpu_variants(stack, nbytes, arguments.folder)
        print_and_report(interleave(bandwidths, arguments.rounds), interleave(latencies, arguments.rounds), nbytes)


Variants = dict[str, Callable[[], float]]


def cpu_variants(stack: contextlib.ExitStack, nbytes: int, folder: str | None) -> tuple[Variants, Variants]:
    data, destination = random_bytes(nbytes), aligned(nbytes)
    memory = MemorySource(data)
    file = stack.enter_context(direct_file(data, folder))
    copier, reader = started(stack, ThreadTransfer(1)), started(stack, ThreadTransfer(2))
    bandwidths: Variants = {
        "memory, raw": timed(nbytes, lambda: np.copyto(destination.numpy(), data.numpy())),
        "memory": timed(nbytes, lambda: move(copier, memory, destination)),
        "disk, raw": timed(nbytes, lambda: read_raw(file.fd, nbytes, memoryview(destination.numpy()))),
        "disk": timed(nbytes, lambda: move(reader, file, destination)),
    }
    for rate in EMULATED_BYTES_PER_S:
        link = started(stack, EmulatedTransfer(rate))
        bandwidths[f"emulated {rate / 1e9:.0f} GB/s"] = timed(nbytes, lambda link=link: move(link, memory, destination))
    latencies = {
        **latency_variants("memory", copier, memory, destination),
        **latency_variants("disk", reader, file, destination),
    }
    return bandwidths, latencies


def cuda_variants(stack: contextlib.ExitStack, nbytes: int) -> tuple[Variants, Variants]:
    device = torch.device("cuda")
    destination = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pageable, pinned = MemorySource(random_bytes(nbytes)), MemorySource(random_bytes(nbytes))
    held = pin(pinned.tensor)
    assert held.error is None, held.error
    stack.callback(held.release)
    transfer = started(stack, CudaTransfer(device))
    guess = Priority.PREFETCH

    def synchronised(action: Callable[[], object]) -> Callable[[], float]:
        return timed(nbytes, lambda: (action(), torch.cuda.synchronize()))

    bandwidths: Variants = {
        "pinned, raw": synchronised(lambda: destination.copy_(pinned.tensor, non_blocking=True)),
        "pinned": synchronised(lambda: move(transfer, pinned, destination)),
        "pinned, guessed": synchronised(lambda: move(transfer, pinned, destination, guess)),
        "pageable, raw": synchronised(lambda: destination.copy_(pageable.tensor)),
        "pageable": synchronised(lambda: move(transfer, pageable, destination)),
    }
    return bandwidths, latency_variants("pinned", transfer, pinned, destination)


def latency_variants(name: str, transfer: Transfer, source: Source, destination: torch.Tensor) -> Variants:
    """Microseconds from submit until a small demand may be read: on an idle link, and with guesses queued."""
    small = part_of(source, 0, SMALL_BYTES)
    half = destination.numel() // 2

    def fetch() -> float:
        start_s = time.perf_counter()
        transfer.submit(small, destination[:SMALL_BYTES], Priority.DEMAND).wait()
        if destination.is_cuda:
            torch.cuda.current_stream().synchronize()
        return (time.perf_counter() - start_s) * 1e6

    def behind_guesses() -> float:
        guess = transfer.submit(part_of(source, half, half), destination[half:], Priority.PREFETCH)
        time.sleep(0.005)  # let it get going
        latency_us = fetch()
        transfer.cancel(guess)
        guess.settle()
        return latency_us

    return {
        f"{name}, idle": lambda: float(np.median([fetch() for _ in range(200)])),
        f"{name}, behind guesses": lambda: float(np.median([behind_guesses() for _ in range(10)])),
    }


def move(transfer: Transfer, source: Source, destination: torch.Tensor, priority: Priority = Priority.DEMAND) -> None:
    """All of `source`, as one ticket per expert-sized piece."""
    pieces = range(0, destination.numel(), TICKET_BYTES)
    tickets = [
        transfer.submit(part_of(source, start, TICKET_BYTES), destination[start : start + TICKET_BYTES], priority)
        for start in pieces
    ]
    for ticket in tickets:
        ticket.wait()


def part_of(source: Source, start: int, nbytes: int) -> Source:
    if isinstance(source, MemorySource):
        return MemorySource(source.tensor[start : start + nbytes])
    return FileSource(source.fd, source.offset + start, nbytes, source.path, source.direct)


def timed(nbytes: int, action: Callable[[], object]) -> Callable[[], float]:
    """A measurement of `action` in GB/s."""
    return lambda: nbytes / seconds(action) / 1e9


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def started(stack: contextlib.ExitStack, transfer: Transfer) -> Transfer:
    stack.callback(transfer.close)
    return transfer


@contextlib.contextmanager
def direct_file(data: torch.Tensor, folder: str | None) -> Iterator[FileSource]:
    """`data` in a temporary file that is opened for direct reads."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="moepic-benchmark-") as place:
        path = Path(place) / "data"
        with path.open("wb") as file:
            file.write(data.numpy().data)
            os.fsync(file.fileno())
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            yield FileSource(fd, 0, data.numel(), str(path), direct=True)
        finally:
            os.close(fd)


def print_and_report(bandwidths: Rounds, latencies: Rounds, nbytes: int) -> None:
    references = {name: f"{name.split(',')[0]}, raw" for name in bandwidths.values if not name.endswith("raw")}
    results: dict[str, Mapping[str, object]] = {}
    for name in bandwidths.values:
        low, high = bandwidths.spread(name)
        row: dict[str, object] = {"GB_per_s": bandwidths.median(name), "spread": (low, high)}
        reference = references.get(name)
        if reference in bandwidths.values:
            row["ratio_to_raw"] = bandwidths.ratio(name, reference)
        elif name.startswith("emulated"):
            row["ratio_to_nominal"] = bandwidths.median(name) / float(name.split()[1])
        results[name] = row
        ratio = next((f"  {value:.3f} of {key[9:]}" for key, value in row.items() if key.startswith("ratio")), "")
        print(f"{name:24s} {row['GB_per_s']:7.2f} GB/s  [{low:.2f}, {high:.2f}]{ratio}")
    for name in latencies.values:
        low, high = latencies.spread(name)
        print(f"{name:24s} {latencies.median(name):7.1f} µs    [{low:.1f}, {high:.1f}]")
    report(
        "transfer",
        {
            "nbytes": nbytes,
            "bandwidth": results,
            "latency_us": {
                name: {"median": latencies.median(name), "spread": latencies.spread(name)} for name in latencies.values
            },
            "disturbed_rounds": bandwidths.num_disturbed + latencies.num_disturbed,
            "disturbed_rounds_kept": bandwidths.all_kept or latencies.all_kept,
        },
    )


if __name__ == "__main__":
    main()
