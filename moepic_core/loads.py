"""Asks the transfer for segments of experts, and tells telemetry how they travelled.

The residency decides what is loaded and where to; here it becomes byte ranges of the store, each with a tag that comes
back with its times. Stalls come back likewise: on a CUDA device they are known only after the step that they delayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .device_cache import LayerCache, Slot
from .geometry import Segment, record_stride, segment
from .host_store import HostStore
from .staging import StagingBuffer
from .telemetry import Telemetry
from .trace import EventKind, Part
from .transfer.base import Priority, Ticket, Transfer


class Tag(NamedTuple):
    """What a transfer carries; comes back with its times."""

    layer: int
    expert: int
    part: Part


class Loads:
    def __init__(self, store: HostStore, transfer: Transfer, caches: Sequence[LayerCache]) -> None:
        self._store = store
        self._transfer = transfer
        self._caches = caches

    def into_slot(self, layer: int, slot: Slot) -> Ticket:
        """Demands the top of the slot's expert straight into the slot."""
        top = self._caches[layer].top
        assert top is not None
        source = self._store.source(layer, slot.expert, top)
        tag = Tag(layer, slot.expert, Part.TOP)
        return self._transfer.submit(source, slot.buffer, Priority.DEMAND, tag=tag, after=slot.fence)

    def into_staging(self, buffer: StagingBuffer, priority: Priority, with_top: bool) -> None:
        """Sends the buffer's expert into it: the bottom, and the top before it when asked."""
        cache = self._caches[buffer.layer]
        geometry, top = cache.geometry, cache.top
        sent = 0  # bytes of the record that the top carries already
        if with_top and top is not None:
            part = Part.TOP if top.stop_row < geometry.neurons else Part.WHOLE
            buffer.top = self._submit(buffer, top, part, priority)
            sent = top.stop
        rows = 0 if top is None else top.stop_row
        if rows < geometry.neurons and sent < record_stride(geometry):
            bottom = segment(geometry, rows, geometry.neurons)
            bottom = replace(bottom, start=max(bottom.start, sent))
            buffer.bottom = self._submit(buffer, bottom, Part.BOTTOM if rows else Part.WHOLE, priority)

    def report(self, telemetry: Telemetry, token: int) -> None:
        """Transfers that have ended; they count for `token`."""
        for event in self._transfer.drain_events():
            kind = EventKind.DEMAND if event.priority is Priority.DEMAND else EventKind.PREFETCH
            assert isinstance(event.tag, Tag), event.tag
            telemetry.event(kind, *event.tag, event.start_s, event.end_s, event.nbytes, token)

    def report_stalls(self, telemetry: Telemetry, token: int) -> None:
        """Waits for transfers that have ended; they count for `token`."""
        for stall in self._transfer.drain_stalls():
            assert isinstance(stall.tag, Tag), stall.tag
            layer, start_s, end_s = stall.tag.layer, stall.start_s, stall.end_s
            telemetry.event(EventKind.STALL, layer, -1, Part.WHOLE, start_s, end_s, 0, token)

    def discard(self) -> None:
        """What travelled for a warm-up, a rehearsal or a probe is in nobody's figures."""
        self._transfer.drain_events()
        self._transfer.drain_stalls()

    def _submit(self, buffer: StagingBuffer, wanted: Segment, part: Part, priority: Priority) -> Ticket:
        return self._transfer.submit(
            self._store.source(buffer.layer, buffer.expert, wanted),
            buffer.buffer[wanted.start : wanted.stop],
            priority,
            tag=Tag(buffer.layer, buffer.expert, part),
            after=buffer.fence,
        )
