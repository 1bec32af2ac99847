"""The contract of `moepic_core.transfer`, held over every backend."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from null_transfer import NullTransfer
from transfer_links import LINKS, SLOW_BYTES_PER_S, Cuda, Link, data_of, link_params

from moepic_core.errors import Cancelled, TransferFailed
from moepic_core.transfer.base import Priority, Ticket, Transfer, TransferEvent
from moepic_core.transfer.clocks import BusyTime

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # no thread dies
DEMAND, PREFETCH = Priority.DEMAND, Priority.PREFETCH


@pytest.fixture(params=link_params(*LINKS))
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Link]:
    link = LINKS[request.param](monkeypatch, tmp_path)
    yield link
    link.close()


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("link", link_params(*names), indirect=True)


QUEUEING = only(*(name for name in LINKS if name != "null-random"))
ASYNCHRONOUS = only(*(name for name in LINKS if not name.startswith("null")))
FALLIBLE = only(*(name for name in LINKS if name != "emulated"))  # memory that cannot be copied ends the process


def order_of(events: list[TransferEvent]) -> list[object]:
    """Tags in the order in which their last chunk started; two threads may end theirs in any order."""
    last_start_s = {event.tag: event.start_s for event in sorted(events, key=lambda event: event.start_s)}
    return sorted(last_start_s, key=lambda tag: last_start_s[tag])


def events_of(transfer: Transfer, *tickets: Ticket) -> list[TransferEvent]:
    for ticket in tickets:
        ticket.wait()
    while not all(ticket.settled for ticket in tickets):
        time.sleep(0.001)
    return transfer.drain_events()


@pytest.mark.parametrize("num_chunks", [0.25, 1, 3, 5.5])
def test_data_arrive_intact(link: Link, num_chunks: float) -> None:
    transfer = link.make()
    nbytes = int(link.chunk_bytes * num_chunks) + 4096 // link.granule * link.granule
    data = [data_of(nbytes, seed) for seed in range(4)]
    buffers = [link.buffer(nbytes) for _ in data]
    tickets = [
        transfer.submit(link.source(piece), buffer, DEMAND if number % 2 else PREFETCH, number)
        for number, (piece, buffer) in enumerate(zip(data, buffers, strict=True))
    ]
    for ticket, piece, buffer in zip(tickets, data, buffers, strict=True):
        assert ticket.wait() >= 0
        assert torch.equal(link.read(buffer), piece)
        assert ticket.done
    events = events_of(transfer, *tickets)
    counters = transfer.counters()
    assert (counters.submitted, counters.succeeded) == (4, 4)
    assert (counters.demand_bytes, counters.prefetch_bytes) == (2 * nbytes, 2 * nbytes)
    assert counters.retried == counters.failed == counters.cancelled == 0
    for number in range(4):
        assert sum(event.nbytes for event in events if event.tag == number) == nbytes
    union = BusyTime()
    for event in events:
        union.add(event.start_s, event.end_s)
    assert counters.busy_s == pytest.approx(union.total_s)
    assert transfer.drain_events() == []
    transfer.check()


@QUEUEING
def test_a_demand_overtakes_a_guess(link: Link) -> None:
    transfer = link.make(slow=True)
    guess_data, need_data = data_of(100 * link.chunk_bytes), data_of(2 * link.chunk_bytes, 1)
    guess_source, need_source = link.source(guess_data), link.source(need_data)  # a device is not held up by pinning
    guess_buffer, need_buffer = link.buffer(guess_data.numel()), link.buffer(need_data.numel())
    guess = transfer.submit(guess_source, guess_buffer, PREFETCH, "guess")
    need = transfer.submit(need_source, need_buffer, DEMAND, "need")
    need.wait()
    assert torch.equal(link.read(need_buffer), need_data)
    events = sorted(events_of(transfer, guess, need), key=lambda event: event.start_s)
    assert torch.equal(link.read(guess_buffer), guess_data)
    position = max(index for index, event in enumerate(events) if event.tag == "need")
    overtaken = len(events) - 1 - position
    # All but those in flight when the demand came, and the ones that moved if this thread was slow to submit it.
    assert overtaken >= 50, f"only {overtaken} of 100 chunks were overtaken"


@QUEUEING
@pytest.mark.parametrize("priority", Priority)
def test_first_in_first_out(link: Link, priority: Priority) -> None:
    transfer = link.make(slow=True)
    data = data_of(4 * link.chunk_bytes)
    source, buffers = link.source(data), [link.buffer(data.numel()) for _ in range(6)]
    tickets = [transfer.submit(source, buffer, priority, number) for number, buffer in enumerate(buffers)]
    assert order_of(events_of(transfer, *tickets)) == list(range(6))


@QUEUEING
def test_a_promoted_guess_goes_before_other_guesses_and_after_earlier_demands(link: Link) -> None:
    transfer = link.make(slow=True)
    data = data_of(24 * link.chunk_bytes)
    source, buffers = link.source(data), [link.buffer(data.numel()) for _ in range(4)]
    first, late, promoted = (
        transfer.submit(source, buffer, PREFETCH, tag)
        for tag, buffer in zip(("first", "late", "promoted"), buffers[:3], strict=True)
    )
    need = transfer.submit(source, buffers[3], DEMAND, "need")
    transfer.promote(promoted)
    assert promoted.priority is DEMAND
    transfer.check()
    assert order_of(events_of(transfer, need, promoted, first, late)) == ["need", "promoted", "first", "late"]
    transfer.promote(late)  # done: no effect
    assert late.priority is PREFETCH
    transfer.check()


def test_a_cancelled_buffer_can_be_used_again(link: Link) -> None:
    transfer = link.make(slow=True)
    buffer = link.buffer(80 * link.chunk_bytes)
    dropped = transfer.submit(link.source(torch.zeros_like(buffer, device="cpu")), buffer, PREFETCH)
    if isinstance(transfer, NullTransfer):
        transfer.begin()  # one chunk is caught in flight
    transfer.cancel(dropped)
    assert dropped.done
    dropped.settle()
    assert dropped.settled
    transfer.check()
    data = data_of(buffer.numel(), 1)
    used = transfer.submit(link.source(data), buffer, DEMAND, after=transfer.fence())
    used.wait()
    assert torch.equal(link.read(buffer), data)
    with pytest.raises(Cancelled):
        dropped.wait()
    transfer.cancel(used)  # done: no effect
    assert used.wait() == 0
    counters = transfer.counters()
    assert (counters.succeeded, counters.cancelled) == (1, 1)
    assert counters.prefetch_bytes < buffer.numel()
    transfer.check()


@FALLIBLE
def test_a_chunk_that_fails_once_is_tried_again(link: Link) -> None:
    transfer = link.make()
    data = data_of(4 * link.chunk_bytes)
    source, buffer = link.source(data), link.buffer(data.numel())
    link.fail(transfer, 1)
    transfer.submit(source, buffer, DEMAND).wait()
    assert torch.equal(link.read(buffer), data)
    assert (transfer.counters().retried, transfer.counters().failed) == (1, 0)


@FALLIBLE
def test_a_chunk_that_keeps_failing_fails_its_ticket_alone(link: Link) -> None:
    transfer = link.make()
    data = data_of(4 * link.chunk_bytes)
    source, buffer = link.source(data), link.buffer(data.numel())
    link.fail(transfer)
    lost = transfer.submit(source, buffer, PREFETCH)
    for _ in range(2):  # every wait says so
        with pytest.raises(TransferFailed, match="twice"):
            lost.wait()
    lost.settle()
    link.fail(transfer, 0)
    transfer.check()
    transfer.submit(source, buffer, DEMAND).wait()
    assert torch.equal(link.read(buffer), data)
    counters = transfer.counters()
    assert (counters.failed, counters.succeeded) == (1, 1)
    assert counters.retried >= 1
    transfer.check()


def test_close_while_busy_ends_every_ticket(link: Link) -> None:
    transfer = link.make(slow=True)
    data = data_of(64 * link.chunk_bytes)
    source = link.source(data)
    tickets = [transfer.submit(source, link.buffer(data.numel()), priority) for priority in (PREFETCH, DEMAND)]
    start_s = time.perf_counter()
    transfer.close()
    assert time.perf_counter() - start_s < 1
    num_cancelled = 0
    for ticket in tickets:
        assert ticket.settled
        ticket.settle()
        try:
            ticket.wait()
        except Cancelled:
            num_cancelled += 1
    assert num_cancelled == transfer.counters().cancelled
    assert num_cancelled == 2 or isinstance(link, Cuda)  # which may be faster than this test
    with pytest.raises(Cancelled):
        transfer.submit(source, link.buffer(data.numel()), DEMAND)
    transfer.check()
    transfer.close()


@ASYNCHRONOUS
def test_close_wakes_a_waiting_thread(link: Link) -> None:
    transfer = link.make(slow=True)
    data = data_of(256 * link.chunk_bytes)
    ticket = transfer.submit(link.source(data), link.buffer(data.numel()), PREFETCH)
    outcome: list[BaseException | float] = []

    def wait() -> None:
        try:
            outcome.append(ticket.wait())
        except Cancelled as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    transfer.close()
    waiter.join(timeout=5)
    assert not waiter.is_alive()
    assert len(outcome) == 1


@only("emulated", "direct", "cuda-simulated", "cuda-simulated-pageable")
def test_a_stop_is_noticed_within_50_ms(link: Link) -> None:
    transfer = link.make(slow=True)
    data = data_of(256 * link.chunk_bytes)  # a quarter of a second
    source, buffer = link.source(data), link.buffer(data.numel())
    noticed_s: list[float] = []
    while len(noticed_s) < 10 and min(noticed_s, default=1) > 0.05:  # a busy machine
        stop = threading.Event()
        ticket = transfer.submit(source, buffer, PREFETCH)
        start_s = time.perf_counter()
        threading.Timer(0.03, stop.set).start()
        with suppress(Cancelled):
            ticket.wait(stop.is_set)
        noticed_s.append(time.perf_counter() - start_s - 0.03)
        done = ticket.done  # a stop ends the wait, not the ticket
        transfer.cancel(ticket)
        ticket.settle()
    assert 0 < noticed_s[-1] < 0.05, noticed_s
    assert not done


@only("emulated", "direct", "cuda-simulated", "cuda-simulated-pageable")
def test_stalled_seconds_are_counted(link: Link) -> None:
    transfer = link.make(slow=True)
    data = data_of(32 * link.chunk_bytes)
    source, buffer = link.source(data), link.buffer(data.numel())
    start_s = time.perf_counter()
    ticket = transfer.submit(source, buffer, DEMAND, "need")
    submitted_s = time.perf_counter()
    ticket.wait()
    link.read(buffer)
    passed_s = time.perf_counter() - start_s
    assert ticket.wait() == 0
    nominal_s = data.numel() / SLOW_BYTES_PER_S
    counters = transfer.counters()
    assert nominal_s - (submitted_s - start_s) - 0.01 < counters.stalled_s <= passed_s
    (stall,) = transfer.drain_stalls()
    assert (stall.tag, stall.end_s - stall.start_s) == ("need", pytest.approx(counters.stalled_s))
    assert transfer.drain_stalls() == []
    assert 0.999 * nominal_s <= counters.busy_s <= passed_s


@only("memory", "direct", "cuda-simulated", "cuda")
def test_200_backends_leave_no_thread_and_no_file_behind(link: Link) -> None:
    data = data_of(link.chunk_bytes)
    source, buffer = link.source(data), link.buffer(data.numel())
    link.make().submit(source, buffer, DEMAND).wait()  # what is opened once and for all is open now
    link.transfers.pop().close()
    num_files = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        transfer = link.build(slow=False)
        transfer.submit(source, buffer, DEMAND)
        transfer.close()
    assert not [running.name for running in threading.enumerate() if running.name.startswith("moepic-transfer")]
    assert len(os.listdir("/proc/self/fd")) == num_files
