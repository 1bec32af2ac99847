"""Slots for the tops of hot experts, layer by layer: what is on the device, and in which state.

A slot is room for one top segment of its layer. `free → arriving → ready ⇄ in use → free`; the residency drives the
transitions, the eviction policy chooses who leaves. Forgetting an expert copies nothing back: the host store is
complete. Never starts a copy from the host, never decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum

import torch
from torch import Tensor

from .arena import Arena
from .geometry import Segment, segment
from .packing import rows_of
from .spec import MoeLayer
from .transfer.base import Fence


class SlotState(Enum):
    FREE = "free"
    ARRIVING = "arriving"
    READY = "ready"
    IN_USE = "in use"


class Slot:
    """One top segment's room. `fence` covers the last computation that read it: overwrite only after it."""

    __slots__ = ("buffer", "expert", "fence", "state", "weights")

    def __init__(self, buffer: Tensor, weights: Tensor) -> None:
        self.buffer = buffer
        self.weights = weights  # [top_rows, matrices, hidden], a view of `buffer`
        self.expert = -1
        self.state = SlotState.FREE
        self.fence: Fence | None = None


class LayerCache:
    """The slots of one layer. All have the same size, given by the layer's split ratio."""

    def __init__(self, geometry: MoeLayer, dtype: torch.dtype, arena: Arena) -> None:
        self.geometry = geometry
        self.dtype = dtype
        self.arena = arena
        self.top_rows = 0
        self.top: Segment | None = None  # None when nothing of an expert is ever cached (split ratio 0)
        self.slots: list[Slot] = []
        self.expert_to_slot: dict[int, Slot] = {}

    def find(self, expert: int) -> Slot | None:
        return self.expert_to_slot.get(expert)

    def whole(self, experts: Iterable[int]) -> list[Slot] | None:
        """The slots of `experts` if every one of them is here entirely, else None. For use between two steps."""
        if self.top_rows < self.geometry.neurons or not all(expert in self.expert_to_slot for expert in experts):
            return None
        return [self.expert_to_slot[expert] for expert in experts]

    def free_slot(self) -> Slot | None:
        if len(self.expert_to_slot) == len(self.slots):
            return None
        return next(slot for slot in self.slots if slot.state is SlotState.FREE)

    def evictable(self, protected: Collection[int]) -> list[int]:
        """Cached experts that nobody computes with and that are not `protected`."""
        return [
            expert
            for expert, slot in self.expert_to_slot.items()
            if slot.state is SlotState.READY and expert not in protected
        ]

    def claim(self, slot: Slot, expert: int) -> None:
        assert slot.state is SlotState.FREE and expert not in self.expert_to_slot, (slot.state, slot.expert, expert)
        slot.expert, slot.state = expert, SlotState.ARRIVING
        self.expert_to_slot[expert] = slot

    def arrived(self, slot: Slot) -> None:
        assert slot.state is SlotState.ARRIVING, (slot.state, slot.expert)
        slot.state = SlotState.IN_USE

    def use(self, slot: Slot) -> None:
        assert slot.state is SlotState.READY, (slot.state, slot.expert)
        slot.state = SlotState.IN_USE

    def release(self, slot: Slot, fence: Fence | None) -> None:
        assert slot.state is SlotState.IN_USE, (slot.state, slot.expert)
        slot.state, slot.fence = SlotState.READY, fence

    def forget(self, slot: Slot) -> None:
        """The slot is free again: its expert was evicted, or never arrived."""
        assert slot.state in (SlotState.READY, SlotState.ARRIVING), (slot.state, slot.expert)
        del self.expert_to_slot[slot.expert]
        slot.expert, slot.state = -1, SlotState.FREE

    def exchange(self, slot: Slot, buffer: Tensor) -> Tensor:
        """The slot takes `buffer`, in which its expert has arrived, and gives its own, of the same size."""
        assert slot.state is SlotState.ARRIVING and buffer.numel() == slot.buffer.numel(), (slot.state, buffer.shape)
        given, slot.buffer = slot.buffer, buffer
        slot.weights = rows_of(buffer, self.geometry, self.dtype, 0, self.top_rows)
        return given

    def shrink(self, num_slots: int, top_rows: int, ranking: list[int]) -> None:
        """First half of a change: gives memory back. Keeps the best of `ranking`; nothing may be in use.

        A smaller top is a prefix of the larger one, so survivors are copied on the device; a larger top cannot be
        completed from here, so those slots are forgotten and refill on demand.
        """
        assert not self._busy(), self._busy()
        place = {expert: position for position, expert in enumerate(ranking)}
        keep = sorted(self.expert_to_slot, key=lambda expert: place.get(expert, len(place)))[:num_slots]
        if top_rows > self.top_rows:
            keep = []
        for expert in set(self.expert_to_slot) - set(keep):
            self.forget(self.expert_to_slot[expert])
        if top_rows == self.top_rows:
            free = [slot for slot in self.slots if slot.state is SlotState.FREE]
            for slot in free[: max(0, len(self.slots) - num_slots)]:
                self._drop(slot)
            return
        for slot in [slot for slot in self.slots if slot.state is SlotState.FREE]:
            self._drop(slot)
        self.top_rows = top_rows
        self.top = segment(self.geometry, 0, top_rows) if top_rows else None
        for slot in list(self.slots):
            self._resize_slot(slot)

    def grow(self, num_slots: int) -> None:
        """Second half: allocates up to `num_slots`. Raises OutOfRoom with everything gained so far in place."""
        while self.top is not None and len(self.slots) < num_slots:
            self.slots.append(self._new_slot())

    def close(self) -> None:
        for slot in self.slots:
            self.arena.free("cache", slot.buffer)
        self.slots.clear()
        self.expert_to_slot.clear()

    def check(self) -> None:
        owners = {slot.expert: slot for slot in self.slots if slot.state is not SlotState.FREE}
        assert owners == self.expert_to_slot, (sorted(owners), sorted(self.expert_to_slot))
        assert all(slot.expert == -1 for slot in self.slots if slot.state is SlotState.FREE)
        expected = self.top.stop if self.top is not None else 0
        assert all(slot.buffer.numel() == expected for slot in self.slots), (self.top_rows, expected)

    def _busy(self) -> list[int]:
        return [slot.expert for slot in self.slots if slot.state in (SlotState.ARRIVING, SlotState.IN_USE)]

    def _new_slot(self) -> Slot:
        assert self.top is not None
        buffer = self.arena.allocate("cache", self.top.stop)
        return Slot(buffer, rows_of(buffer, self.geometry, self.dtype, 0, self.top_rows))

    def _drop(self, slot: Slot) -> None:
        assert slot.state is SlotState.FREE, (slot.state, slot.expert)
        self.slots.remove(slot)
        self.arena.free("cache", slot.buffer)

    def _resize_slot(self, old: Slot) -> None:
        """Replaces a ready slot by a smaller one with the same rows; without room for both at once it is forgotten."""
        expert, room = old.expert, self.arena.budget_bytes - self.arena.used_bytes
        self.forget(old)
        if self.top is None or room < self.top.stop:
            self._drop(old)
            return
        new = self._new_slot()
        new.buffer.copy_(old.buffer[: new.buffer.numel()])
        self._drop(old)
        self.slots.append(new)
        self.claim(new, expert)
        self.arrived(new)
        self.release(new, None)
