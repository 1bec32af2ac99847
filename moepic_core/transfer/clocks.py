"""Time on the link: how long it was busy in all, when a CUDA device did what, and sleep until a chunk has come.

The ledger adds up chunks in a `BusyTime`; `cuda.py` reads its events through a `DeviceClock`. Neither waits for a copy.
`emulated.py` sleeps precisely.
"""

# torch.cuda is not annotated.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import ctypes
import functools
import sys
import time
from bisect import bisect_left, bisect_right

import torch

_MAX_GAPS = 1 << 10
_ANCHOR_S = 5.0
_ANCHOR_TIMEOUT_S = 100e-6


def sleep_precisely(seconds: float) -> None:
    """Sleep that ends 15 µs late instead of 70: Linux adds a slack of 50 µs to a thread's sleeps unless told not to."""
    if sys.platform == "linux":
        pr_set_timerslack = 29
        _libc().prctl(pr_set_timerslack, 1, 0, 0, 0)
    time.sleep(seconds)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class BusyTime:
    """Length of the union of intervals, which may come in any order and overlap.

    Only the latest disjoint pieces are kept to compare with; an interval older than all of them would count in full.
    """

    def __init__(self) -> None:
        self.total_s = 0.0
        self._starts: list[float] = []  # of disjoint intervals in ascending order
        self._ends: list[float] = []

    def add(self, start_s: float, end_s: float) -> None:
        assert start_s <= end_s, (start_s, end_s)
        first, last = bisect_left(self._ends, start_s), bisect_right(self._starts, end_s)  # [first, last) are touched
        covered_s = sum(self._ends[first:last]) - sum(self._starts[first:last])
        if first < last:
            start_s, end_s = min(start_s, self._starts[first]), max(end_s, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start_s], [end_s]
        self.total_s += end_s - start_s - covered_s
        if len(self._starts) > _MAX_GAPS:
            del self._starts[: _MAX_GAPS // 2], self._ends[: _MAX_GAPS // 2]


class DeviceClock:
    """Tells when an event happened, in seconds of time.perf_counter, from an anchor that both clocks know.

    Times are right to a microsecond while the anchor is young: `renew` it whenever the stream is idle.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        stream.synchronize()
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._anchor.record(stream)
        self._anchor.synchronize()
        self._anchor_s = self._tried_s = time.perf_counter()

    def host_s(self, event: torch.cuda.Event) -> float:
        """Time of a completed timing event."""
        elapsed_ms: float = self._anchor.elapsed_time(event)
        return self._anchor_s + elapsed_ms * 1e-3

    def renew(self) -> None:
        """Now and then take a new anchor: the clocks drift, and CUDA counts in milliseconds of float32.

        Keeps the old anchor if the stream is not idle.
        """
        start_s = time.perf_counter()
        if start_s - self._tried_s < _ANCHOR_S:
            return
        self._tried_s = start_s
        anchor = torch.cuda.Event(enable_timing=True)
        anchor.record(self._stream)
        while not anchor.query():
            if time.perf_counter() - start_s > _ANCHOR_TIMEOUT_S:
                return
        self._anchor, self._anchor_s = anchor, time.perf_counter()
