"""Asks the transfer for segments of experts, and tells telemetry how they travelled.

The residency decides what is loaded and where to; here it becomes byte ranges of the store, each with a tag that comes
back with its times. Stalls come back likewise: on a CUDA device they are known only after the step that they delayed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from .device_cache import LayerCache, Slot
from .errors import MoepicError
from .geometry import Segment, record_stride, segment
from .host_store import HostStore
from .spec import MoeLayer
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
        top, bottom = _sent(cache.geometry, cache.top, with_top)
        if top is not None:
            buffer.top = self._submit(buffer, *top, priority)
        if bottom is not None:
            buffer.bottom = self._submit(buffer, *bottom, priority)

    def fill(self, rankings: Sequence[Sequence[int]], cancelled: Callable[[], bool]) -> None:
        """Brings tops into all free slots, of each layer those ranked highest that lack one, and waits for them.

        Raises Cancelled and TransferFailed; what had not arrived by then is not cached.
        """
        for layer, (cache, ranking) in enumerate(zip(self._caches, rankings, strict=True)):
            missing = [expert for expert in ranking if cache.find(expert) is None]
            travelling = []
            for expert in missing:
                slot = cache.free_slot()
                if slot is None:
                    break
                cache.claim(slot, expert)
                travelling.append((slot, self.into_slot(layer, slot)))
            for place, (slot, ticket) in enumerate(travelling):
                try:
                    ticket.wait(cancelled)
                except MoepicError:
                    for waiting, late in travelling[place:]:
                        self._transfer.cancel(late)
                        late.settle()
                        cache.forget(waiting)
                    raise
                cache.arrived(slot)
                cache.release(slot, None)
        self.discard()

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


_Sent = tuple[Segment, Part] | None


@functools.cache
def _sent(geometry: MoeLayer, top: Segment | None, with_top: bool) -> tuple[_Sent, _Sent]:
    """The top and the bottom that travel into a staging buffer; together they are all that a slot would lack."""
    sent_top: _Sent = None
    sent_bottom: _Sent = None
    sent = 0  # bytes of the record that the top carries already
    if with_top and top is not None:
        sent_top, sent = (top, Part.TOP if top.stop_row < geometry.neurons else Part.WHOLE), top.stop
    rows = 0 if top is None else top.stop_row
    if rows < geometry.neurons and sent < record_stride(geometry):
        bottom = segment(geometry, rows, geometry.neurons)
        bottom = replace(bottom, start=max(bottom.start, sent))
        sent_bottom = bottom, Part.BOTTOM if rows else Part.WHOLE
    return sent_top, sent_bottom
