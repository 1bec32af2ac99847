"""The recorded trace: what its rows mean, the ring that keeps the newest, and the time that transfers cover.

`telemetry` writes rows, `planner`, `simulator` and exports read them; the formulas of `metrics.METRICS` run over them.
A row belongs to the reply and the phase in which it was recorded. Token numbers count over the session, times are
seconds of one monotonic clock, -1 stands for no expert or no layer. Neither class locks: their owner does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .routing import UNKNOWN, RoutingTrace


class EventKind(IntEnum):
    COMPUTE = 0  # a segment was computed
    STALL = 1  # compute had nothing to do but wait for the link
    DEMAND = 2  # a demand load was under way
    PREFETCH = 3  # a prefetch was under way
    USED = 4  # prefetched bytes met their first use (an instant)
    WASTED = 5  # prefetched bytes were forgotten unused (an instant)
    TOKEN = 6  # a new token was made, since the token before it or the start of the reply
    STEP = 7  # a layer's experts were at work: from its router's answer until the last of them was computed
    ADMIT = 8  # a top that had arrived was copied into its slot, on the device


class Part(IntEnum):
    WHOLE = 0
    TOP = 1
    BOTTOM = 2


class Outcome(IntEnum):
    """What was resident of an expert when it was used; also the codes of the residency map."""

    MISS = 0
    PARTIAL = 1
    HIT = 2


class TracePhase(IntEnum):
    PREFILL = 0
    DECODE = 1


EVENT = np.dtype([
    ("kind", "u1"), ("phase", "u1"), ("part", "u1"), ("layer", "i2"), ("expert", "i2"), ("reply", "i4"),
    ("token", "i8"), ("nbytes", "i8"), ("start_s", "f8"), ("end_s", "f8"),
])  # fmt: skip


def routing_dtype(top_k: int) -> np.dtype[np.void]:
    """What one layer used in the pass that began with `token`: its experts, what was resident, by how many tokens.

    A row has room for top_k experts: one row per layer in decode, as many as it takes in prefill, the last one padded
    with counts of 0. `guesses` were predicted for the layer, best first, padded with -1. `slots` is what the plan that
    held then gave the layer, 0 before there is one.
    """
    return np.dtype([
        ("token", "i8"), ("reply", "i4"), ("layer", "i2"), ("phase", "u1"),
        ("experts", "i2", (top_k,)), ("outcomes", "u1", (top_k,)), ("counts", "i4", (top_k,)),
        ("guesses", "i2", (top_k,)), ("slots", "i4"),
    ])  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """The newest rows, oldest first, and how many older ones were overwritten."""

    events: NDArray[np.void]  # [rows] of EVENT
    routing: NDArray[np.void]  # [rows] of routing_dtype
    lost_events: int
    lost_routing: int


def decoded(trace: Trace, num_experts: Sequence[int], source: str, subjects: Mapping[int, str]) -> RoutingTrace:
    """What the routing rows say of decoding, one entry per token of which every layer is still there.

    `num_experts` per layer; `subjects` names what replies were about, by their number, where that is known.
    """
    rows = whole_tokens(trace, len(num_experts))
    experts = used_experts(rows)
    names = tuple(dict.fromkeys(subjects.values())) or (UNKNOWN,)
    replies = rows["reply"][:, 0]
    numbers = [names.index(subjects[reply]) if reply in subjects else 0 for reply in replies.tolist()]
    return RoutingTrace(
        experts, np.array(rows["guesses"]), tuple(num_experts), replies.astype(np.int32), np.array(numbers, np.int16),
        names, source,
    )  # fmt: skip


def whole_tokens(trace: Trace, num_layers: int) -> NDArray[np.void]:
    """Routing rows [tokens, layers] of the decoded tokens of which every layer is still there, in order."""
    rows = trace.routing[trace.routing["phase"] == TracePhase.DECODE]
    tokens, sizes = np.unique(rows["token"], return_counts=True)
    rows = rows[np.isin(rows["token"], tokens[sizes == num_layers])]
    return np.reshape(rows[np.lexsort((rows["layer"], rows["token"]))], (-1, num_layers))


def used_experts(rows: NDArray[np.void]) -> NDArray[np.int16]:
    """The experts [..., k] that routing `rows` used, -1 where a row is padded."""
    return np.where(rows["counts"] > 0, rows["experts"], np.int16(-1))


class Ring:
    """The newest `capacity` rows of an endless sequence."""

    def __init__(self, dtype: np.dtype[np.void], capacity: int) -> None:
        self._rows = np.zeros(capacity, dtype)
        self.written = 0

    def put(self, row: tuple[Any, ...]) -> None:
        self._rows[self.written % len(self._rows)] = row
        self.written += 1

    def since(self, first: int) -> tuple[NDArray[np.void], int]:
        """A copy of the rows from number `first` on, and how many of those were overwritten."""
        assert 0 <= first <= self.written, f"row {first} of {self.written}"
        capacity = len(self._rows)
        oldest = max(first, self.written - capacity)
        start = oldest % capacity
        end = start + self.written - oldest  # beyond the last row if the wanted ones wrap around
        return np.concatenate((self._rows[start:end], self._rows[: max(0, end - capacity)])), oldest - first


class Coverage:
    """Length of the union of intervals told in any order: transfers overlap, as demand overtakes prefetch."""

    _MEMORY = 64  # separate intervals remembered; a transfer that outlives more counts only from the newest forgotten

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._floor = -inf

    def add(self, start: float, end: float) -> float:
        """The seconds of [start, end] that no interval before it has covered."""
        starts, ends = self._starts, self._ends
        start = max(start, self._floor)
        if end <= start:
            return 0.0
        covered = 0.0
        if not ends or start > ends[-1]:  # beyond all others; the usual case, and faster so
            starts.append(start)
            ends.append(end)
        else:
            first, last = bisect_left(ends, start), bisect_right(starts, end)  # [first, last) touch the new interval
            if first < last:
                covered = sum(ends[first:last]) - sum(starts[first:last])
                start, end = min(start, starts[first]), max(end, ends[last - 1])
            starts[first:last], ends[first:last] = [start], [end]
        if len(starts) > self._MEMORY:
            self._floor = ends.pop(0)
            del starts[0]
        return end - start - covered

    def check(self) -> None:
        """Raise AssertionError if the remembered intervals are not separate and in order."""
        bounds = [self._floor, *(bound for pair in zip(self._starts, self._ends, strict=True) for bound in pair)]
        assert bounds == sorted(bounds), f"intervals out of order: {bounds}, wanted {sorted(bounds)}"
