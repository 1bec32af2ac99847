"""What only one transfer backend promises: pacing and disks, the device's queue, and the null backend's own manners."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent
from null_transfer import NullTransfer
from transfer_links import SLOW_BYTES_PER_S, data_of

from moepic_core.errors import TransferFailed
from moepic_core.transfer import clocks, pinning, thread
from moepic_core.transfer.base import Fence, FileSource, MemorySource, Priority, Transfer
from moepic_core.transfer.cuda import CudaTransfer
from moepic_core.transfer.device_queue import DeviceQueue
from moepic_core.transfer.emulated import EmulatedTicket, EmulatedTransfer
from moepic_core.transfer.pinning import pin
from moepic_core.transfer.thread import ThreadTransfer

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # no thread dies
DEMAND, PREFETCH = Priority.DEMAND, Priority.PREFETCH
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def closing() -> Iterator[list[Transfer]]:
    transfers: list[Transfer] = []
    yield transfers
    for transfer in transfers:
        transfer.close()


# An emulated link


@pytest.mark.parametrize(("chunk_bytes", "rate_bytes_per_s"), [(64 * KIB, 1e9), (MIB, 2e9), (4 * MIB, 2e9)])
def test_an_emulated_link_has_its_nominal_bandwidth(
    closing: list[Transfer], chunk_bytes: int, rate_bytes_per_s: float
) -> None:
    transfer = EmulatedTransfer(rate_bytes_per_s, chunk_bytes)
    closing.append(transfer)
    source = MemorySource(data_of(16 * MIB))
    destinations = [torch.zeros(16 * MIB, dtype=torch.uint8) for _ in range(7)]
    measured: list[float] = []
    while len(measured) < 10 and max(measured, default=0) < 0.9 * rate_bytes_per_s:  # a busy machine
        start_s = time.perf_counter()
        tickets = [transfer.submit(source, destination, DEMAND) for destination in destinations]
        for ticket in tickets:
            ticket.wait()
        measured.append(7 * 16 * MIB / (time.perf_counter() - start_s))
    assert 0.9 * rate_bytes_per_s <= max(measured) <= rate_bytes_per_s, measured


def test_an_emulated_link_is_never_faster_than_nominal_and_idle_time_is_not_saved_up(closing: list[Transfer]) -> None:
    transfer = EmulatedTransfer(1e9, chunk_bytes=64 * KIB)
    closing.append(transfer)
    source = MemorySource(data_of(4 * MIB))
    for _ in range(3):
        start_s = time.perf_counter()
        transfer.submit(source, torch.empty(4 * MIB, dtype=torch.uint8), DEMAND).wait()
        assert time.perf_counter() - start_s >= 4 * MIB / 1e9
        time.sleep(0.01)


def test_a_very_slow_link_lets_go_at_once(closing: list[Transfer]) -> None:
    transfer = EmulatedTransfer(1e4, chunk_bytes=MIB)
    closing.append(transfer)
    source, start_s = MemorySource(data_of(MIB)), time.perf_counter()
    on_link, queued = (transfer.submit(source, torch.empty(MIB, dtype=torch.uint8), DEMAND) for _ in range(2))
    assert (on_link.taken_bytes, queued.taken_bytes) == (MIB, 0)
    for ticket in (on_link, queued):
        transfer.cancel(ticket)
        ticket.settle()
    transfer.close()
    assert time.perf_counter() - start_s < 1, "a chunk takes 100 s on this link"
    transfer.check()


class Clock:
    """Stands still until a test moves it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        patch.setattr(time, "perf_counter", lambda: self.now_s)


def wait_for_copies(transfer: EmulatedTransfer, *tickets: EmulatedTicket) -> None:
    transfer.start()
    while any(len(ticket.copied_s) * transfer.chunk_bytes < ticket.nbytes for ticket in tickets):
        time.sleep(0.001)


def test_an_emulated_link_in_numbers(closing: list[Transfer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk takes a second; copies run ahead, and nobody but the clock decides what arrives when."""
    clock = Clock(monkeypatch)
    transfer = EmulatedTransfer(4.0 * KIB, chunk_bytes=4 * KIB)
    closing.append(transfer)
    source, late = MemorySource(data_of(12 * KIB)), MemorySource(data_of(4 * KIB, 1))
    guess = transfer.submit(source, torch.empty(12 * KIB, dtype=torch.uint8), PREFETCH, "guess")
    wait_for_copies(transfer, guess)
    clock.now_s = 1.5  # its second chunk is on the link
    need = transfer.submit(late, torch.empty(4 * KIB, dtype=torch.uint8), DEMAND, "need")
    wrong = transfer.submit(source, torch.empty(12 * KIB, dtype=torch.uint8), PREFETCH, "wrong")
    wait_for_copies(transfer, need, wrong)
    clock.now_s = 2.9
    assert not need.done
    clock.now_s = 3.0
    assert need.done
    assert torch.equal(need.destination, late.tensor)
    assert (guess.taken_bytes, guess.done, wrong.taken_bytes) == (12 * KIB, False, 0)
    clock.now_s = 4.25
    transfer.cancel(wrong)
    assert wrong.settled
    clock.now_s = 20.0
    assert guess.done
    last = transfer.submit(late, torch.empty(4 * KIB, dtype=torch.uint8), DEMAND, "last")
    wait_for_copies(transfer, last)
    clock.now_s = 30.0
    assert [(event.tag, event.start_s, event.end_s) for event in transfer.drain_events()] == [
        ("guess", 0.0, 1.0),
        ("guess", 1.0, 2.0),
        ("need", 2.0, 3.0),
        ("guess", 3.0, 4.0),
        ("wrong", 4.0, 4.25),
        ("last", 20.0, 21.0),
    ]
    transfer.check()


def test_an_emulated_link_waits_for_a_late_copy(closing: list[Transfer], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, may_copy, copy = Clock(monkeypatch), threading.Event(), ctypes.memmove
    monkeypatch.setattr(ctypes, "memmove", lambda *piece: (may_copy.wait(), copy(*piece)))
    transfer = EmulatedTransfer(4.0 * KIB, chunk_bytes=4 * KIB)
    closing.append(transfer)
    source = MemorySource(data_of(4 * KIB))
    first, second = (transfer.submit(source, torch.empty(4 * KIB, dtype=torch.uint8), DEMAND) for _ in range(2))
    clock.now_s = 5.0
    assert (first.done, first.taken_bytes, second.taken_bytes) == (False, 4 * KIB, 0)
    may_copy.set()
    wait_for_copies(transfer, first, second)
    assert (first.done, second.done) == (True, True)
    assert [(event.start_s, event.end_s) for event in transfer.drain_events()] == [(0.0, 5.0), (1.0, 5.0)]
    assert transfer.counters().busy_s == 5.0


def test_nothing_is_copied_before_the_computing_thread_says_so(closing: list[Transfer]) -> None:
    transfer = EmulatedTransfer(1e9)
    closing.append(transfer)
    while not transfer._asleep:
        time.sleep(0.001)
    ticket = transfer.submit(MemorySource(data_of(KIB)), torch.empty(KIB, dtype=torch.uint8), DEMAND)
    assert (ticket.begun_bytes, transfer._asleep) == (0, True)
    wait_for_copies(transfer, ticket)


def test_a_copier_that_dies_of_a_bug_fails_everybody(closing: list[Transfer], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    monkeypatch.setattr(ctypes, "memmove", broken)
    transfer = EmulatedTransfer(1e9, chunk_bytes=4096)
    closing.append(transfer)
    source = MemorySource(data_of(8192))
    tickets = [transfer.submit(source, torch.empty(8192, dtype=torch.uint8), priority) for priority in Priority]
    for ticket in tickets:
        with pytest.raises(TransferFailed, match=r"died.*ZeroDivisionError.*a bug"):
            ticket.wait()
        ticket.settle()
    transfer._copier.join()
    assert [args.exc_type for args in heard] == [ZeroDivisionError]
    with pytest.raises(TransferFailed, match="died"):
        transfer.submit(source, torch.empty(8192, dtype=torch.uint8), DEMAND)
    transfer.check()


def test_a_file_is_no_source_for_an_emulated_link(closing: list[Transfer]) -> None:
    transfer = EmulatedTransfer(1e9)
    closing.append(transfer)
    with pytest.raises(AssertionError, match="host memory"):
        transfer.submit(FileSource(0, 0, 4096, "x", False), torch.empty(4096, dtype=torch.uint8), DEMAND)


# Threads


def test_a_short_file_is_named_with_place_and_reason(closing: list[Transfer], tmp_path: Path) -> None:
    path = tmp_path / "experts.moepic"
    path.write_bytes(bytes(6000))
    transfer = ThreadTransfer(2, chunk_bytes=4096)
    closing.append(transfer)
    with path.open("rb") as file:
        source = FileSource(file.fileno(), 0, 8192, str(path), direct=False)
        ticket = transfer.submit(source, torch.empty(8192, dtype=torch.uint8), DEMAND)
        with pytest.raises(TransferFailed, match=r"experts\.moepic, 4096 bytes at offset 4096.*short read, 1904 bytes"):
            ticket.wait()
        ticket.settle()
    assert transfer.counters().retried == 1


def test_a_closed_file_fails_with_the_reason_of_the_system(closing: list[Transfer], tmp_path: Path) -> None:
    fd = os.open(tmp_path / "experts.moepic", os.O_RDWR | os.O_CREAT)
    os.close(fd)
    transfer = ThreadTransfer()
    closing.append(transfer)
    ticket = transfer.submit(FileSource(fd, 0, 4096, "gone", False), torch.empty(4096, dtype=torch.uint8), DEMAND)
    with pytest.raises(TransferFailed, match=r"gone.*Bad file descriptor"):
        ticket.wait()


def test_a_thread_that_dies_of_a_bug_fails_everybody_and_tells_why(
    closing: list[Transfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(chunk: object) -> None:
        raise ZeroDivisionError("a bug")

    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    monkeypatch.setattr(thread, "_copy", broken)
    transfer = ThreadTransfer(num_workers=1, chunk_bytes=4096)
    closing.append(transfer)
    source = MemorySource(data_of(4096))
    tickets = [transfer.submit(source, torch.empty(4096, dtype=torch.uint8), DEMAND)]
    with pytest.raises(TransferFailed, match="died"):
        tickets[0].wait()
    transfer._workers[0].join()
    assert [args.exc_type for args in heard] == [ZeroDivisionError]
    with pytest.raises(TransferFailed, match=r"ZeroDivisionError.*a bug"):
        transfer.submit(source, torch.empty(4096, dtype=torch.uint8), DEMAND)
    transfer.check()


# Requests that a backend refuses, because the caller has a bug


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        (MemorySource(torch.zeros(8)), torch.zeros(8, dtype=torch.uint8), "float32"),
        (MemorySource(torch.zeros(8, dtype=torch.uint8)), torch.zeros(8), "float32"),
        (MemorySource(torch.zeros(8, dtype=torch.uint8)), torch.zeros(9, dtype=torch.uint8), "8 bytes into 9"),
        (MemorySource(torch.zeros(0, dtype=torch.uint8)), torch.zeros(0, dtype=torch.uint8), "0 bytes"),
        (MemorySource(torch.zeros(16, dtype=torch.uint8)[::2]), torch.zeros(8, dtype=torch.uint8), "stride"),
        (MemorySource(torch.zeros(8, dtype=torch.uint8)), torch.zeros(2, 4, dtype=torch.uint8), "2 dimensions"),
        (FileSource(0, 512, 4096, "x", True), torch.zeros(4096, dtype=torch.uint8), "offset 512"),
        (FileSource(0, 0, 5000, "x", True), torch.zeros(5000, dtype=torch.uint8), "size 5000"),
        (FileSource(0, 0, 4096, "x", True), torch.zeros(8192, dtype=torch.uint8)[1:4097], "address"),
    ],
)
def test_impossible_requests(source: MemorySource | FileSource, destination: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        NullTransfer().submit(source, destination, DEMAND)


# The device's queue


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    device = fake_cuda.install(monkeypatch, SLOW_BYTES_PER_S)
    yield device
    device.stop()


@pytest.fixture
def cuda(device: FakeCuda) -> Iterator[CudaTransfer]:
    transfer = CudaTransfer(torch.device("cpu"), chunk_bytes=64 * KIB)
    yield transfer
    transfer.close()


def test_nothing_is_written_before_compute_has_passed_the_fence(device: FakeCuda, cuda: CudaTransfer) -> None:
    busy = FakeEvent()
    device.compute.wait_event(busy)  # compute still reads the buffer
    buffer, data = torch.zeros(64 * KIB, dtype=torch.uint8), data_of(64 * KIB)
    for priority in Priority:
        ticket = cuda.submit(MemorySource(data), buffer, priority, after=cuda.fence())
        time.sleep(0.02)
        assert not buffer.any()
        busy._fire()
        ticket.wait()
        device.compute.synchronize()
        assert torch.equal(buffer, data)
        busy = FakeEvent()
        device.compute.wait_event(busy)
        buffer.zero_()
    busy._fire()


def test_wait_does_not_block_the_host_once_copies_are_on_the_device(device: FakeCuda, cuda: CudaTransfer) -> None:
    data, buffer = data_of(MIB), torch.zeros(MIB, dtype=torch.uint8)
    late, start_s = FakeEvent(), time.perf_counter()
    ticket = cuda.submit(MemorySource(data), buffer, DEMAND, after=Fence(late))
    assert ticket.wait() < 1
    assert not ticket.done, "the copy has not begun"
    cuda._queue._stalls[0].reached.synchronize()
    late._fire()
    device.compute.synchronize()
    assert torch.equal(buffer, data)
    assert MIB / SLOW_BYTES_PER_S <= cuda.counters().stalled_s <= time.perf_counter() - start_s


def test_guesses_never_fill_the_device_queue(cuda: CudaTransfer) -> None:
    source = MemorySource(data_of(2 * MIB))
    guess = cuda.submit(source, torch.empty(2 * MIB, dtype=torch.uint8), PREFETCH, "guess")
    deepest = 0
    while not guess.done:
        deepest = max(deepest, guess.num_in_flight)
    assert deepest == 2, deepest


def test_no_guess_starts_while_a_demand_travels(cuda: CudaTransfer) -> None:
    source = MemorySource(data_of(MIB))
    need = cuda.submit(source, torch.empty(MIB, dtype=torch.uint8), DEMAND, "need")
    guess = cuda.submit(source, torch.empty(MIB, dtype=torch.uint8), PREFETCH, "guess")
    guess.wait()
    while not guess.settled:
        time.sleep(0.001)
    need_event, *guess_events = sorted(cuda.drain_events(), key=lambda event: event.start_s)
    assert need_event.nbytes == MIB, "a demand is one copy"
    assert need_event.tag == "need"
    assert min(event.start_s for event in guess_events) >= need_event.end_s
    assert need.done


def test_a_promoted_guess_goes_to_the_device_at_once(cuda: CudaTransfer) -> None:
    source = MemorySource(data_of(8 * MIB))
    need = cuda.submit(source, torch.empty(8 * MIB, dtype=torch.uint8), DEMAND)
    guess = cuda.submit(source, torch.empty(8 * MIB, dtype=torch.uint8), PREFETCH)
    cuda.promote(guess)
    guess.wait()
    assert not need.done, "the host did not wait for the earlier demand, which takes 131 ms"


def test_bytes_from_pageable_memory_are_counted(device: FakeCuda, cuda: CudaTransfer) -> None:
    source = MemorySource(data_of(64 * KIB))
    cuda.submit(source, torch.empty(64 * KIB, dtype=torch.uint8), DEMAND).wait()
    assert cuda.counters().unpinned_bytes == 0
    device.pinned = False
    cuda.submit(source, torch.empty(64 * KIB, dtype=torch.uint8), DEMAND).wait()
    assert cuda.counters().unpinned_bytes == 64 * KIB


def test_a_file_is_no_source_for_a_device(cuda: CudaTransfer) -> None:
    with pytest.raises(AssertionError, match="host memory"):
        cuda.submit(FileSource(0, 0, 4096, "x", False), torch.empty(4096, dtype=torch.uint8), DEMAND)


def test_a_feeder_that_dies_of_a_bug_fails_everybody(cuda: CudaTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    monkeypatch.setattr(DeviceQueue, "put", broken)
    ticket = cuda.submit(MemorySource(data_of(4096)), torch.empty(4096, dtype=torch.uint8), PREFETCH)
    with pytest.raises(TransferFailed, match="died"):
        ticket.wait()
    ticket.settle()
    cuda._feeder.join()
    assert [args.exc_type for args in heard] == [ZeroDivisionError]
    cuda.check()


def test_the_device_clock_is_renewed_only_when_due_and_idle(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = device.stream()
    clock = clocks.DeviceClock(stream)
    first = clock._anchor
    clock.renew()
    assert clock._anchor is first, "not due"
    monkeypatch.setattr(clocks, "_ANCHOR_S", 0.0)
    blocker = FakeEvent()
    stream.wait_event(blocker)
    clock.renew()
    assert clock._anchor is first, "not idle"
    blocker._fire()
    stream.synchronize()
    monkeypatch.setattr(clocks, "_ANCHOR_TIMEOUT_S", 1.0)
    clock.renew()
    assert clock._anchor is not first
    event = FakeEvent()
    event.record(stream)
    event.synchronize()
    assert clock.host_s(event) == pytest.approx(event.fired_s, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_pinning_without_a_device_says_so() -> None:
    pinned = pin(torch.zeros(4096, dtype=torch.uint8))
    assert (pinned.error, pinned.nbytes) == ("there is no CUDA device", 4096)
    pinned.release()


@pytest.mark.gpu
def test_pinning_takes_exactly_what_is_there_and_a_refusal_leaves_no_trace() -> None:
    memory = data_of(3 * MIB)
    pinned = pin(memory[: 2 * MIB])
    assert pinned.error is None
    assert memory[MIB : 2 * MIB].is_pinned(), "slices are pinned too"
    again = pin(memory[: 2 * MIB])
    assert again.error is not None
    assert "already" in again.error
    assert torch.ones(1, device="cuda").item() == 1, "the next kernel is not blamed"
    pinned.release()
    pinned.release()
    assert not memory[MIB : 2 * MIB].is_pinned()


def test_a_refused_pin_carries_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cudart:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802
            return 2

        def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
            return {2: "out of memory"}[code]

    forgotten: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(pinning, "_forget_last_error", lambda: forgotten.append(True))
    pinned = pin(torch.zeros(4096, dtype=torch.uint8))
    assert pinned.error == "out of memory"
    assert forgotten == [True]
    pinned.release()


# The null backend


def test_unfinished_destinations_are_not_a_number() -> None:
    transfer = NullTransfer()
    data, buffer = torch.arange(4096, dtype=torch.float32), torch.zeros(4096)
    ticket = transfer.submit(MemorySource(data.view(torch.uint8)), buffer.view(torch.uint8), DEMAND)
    assert buffer.isnan().all()
    assert buffer.to(torch.bfloat16).isnan().all()
    assert transfer.step() == 1
    assert torch.equal(buffer[:1024], data[:1024])
    assert buffer[1024:].isnan().all()
    assert ticket.wait() == 3.0
    assert torch.equal(buffer, data)


def test_held_tickets_move_only_for_their_waiter_and_seeds_change_the_order() -> None:
    def arrivals(transfer: NullTransfer) -> list[object]:
        source = MemorySource(data_of(4096))
        tickets = [transfer.submit(source, torch.empty(4096, dtype=torch.uint8), DEMAND, tag) for tag in range(8)]
        while transfer.step():
            pass
        for ticket in tickets:
            ticket.wait()
        return [event.tag for event in transfer.drain_events()]

    held = NullTransfer()
    held.held = {2}
    assert arrivals(held) == [0, 1, 3, 4, 5, 6, 7, 2]
    assert arrivals(NullTransfer(seed=1)) == arrivals(NullTransfer(seed=1))
    assert len({tuple(arrivals(NullTransfer(seed=seed))) for seed in range(5)}) > 1


def test_a_buffer_that_is_still_written_to_is_refused() -> None:
    transfer = NullTransfer()
    memory, source = torch.empty(12288, dtype=torch.uint8), MemorySource(data_of(8192))
    first = transfer.submit(source, memory[:8192], DEMAND, "first")
    chunk = transfer.begin()
    assert chunk is not None
    transfer.cancel(first)
    with pytest.raises(AssertionError, match="second would overwrite the destination of first"):
        transfer.submit(source, memory[4096:], DEMAND, "second")
    first.settle()
    transfer.submit(source, memory[4096:], DEMAND, "second", after=Fence()).wait()


def test_failures_by_tag() -> None:
    transfer = NullTransfer()
    source = MemorySource(data_of(4096))
    transfer.failures = {"once": 1, "always": math.inf}
    transfer.submit(source, torch.empty(4096, dtype=torch.uint8), DEMAND, "once").wait()
    with pytest.raises(TransferFailed, match="always"):
        transfer.submit(source, torch.empty(4096, dtype=torch.uint8), DEMAND, "always").wait()
    assert transfer.counters().retried == 2
    assert not threading.active_count() > 64
