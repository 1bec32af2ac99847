"""Slots for a given room of cache: the same for every layer, or more of what a plan has already.

`planner` calls it for plans without a configurator, and to spend what is left over. Pure numbers, in bytes of slots.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .allocation import dynamic_program
from .geometry import top_bytes, top_rows
from .spec import LayerPlan, MoeLayer

DEFAULT_SPLIT = 0.4  # best uniform ratio in the paper's preliminary study (arXiv 2509.08342, Qwen1.5-MoE)
MOST_UNITS = 2000  # that a dynamic program hands out


def shares_of(layers: Sequence[MoeLayer], slots: Sequence[int], rows: Sequence[int]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(count, own, own / layer.neurons) for layer, count, own in zip(layers, slots, rows, strict=True)
    )


def cache_bytes(layers: Sequence[MoeLayer], shares: Sequence[LayerPlan]) -> int:
    """Device bytes of all slots."""
    return sum(share.slots * top_bytes(layer, share.top_rows) for layer, share in zip(layers, shares, strict=True))


def all_tops(layers: Sequence[MoeLayer], split: float) -> int:
    """Bytes that the tops of all experts take."""
    return sum(layer.num_experts * top_bytes(layer, top_rows(layer, split)) for layer in layers)


def roomiest_split(layers: Sequence[MoeLayer], room: int) -> float:
    """The default ratio, or the largest with which all tops fit: room that is left over makes tops longer (ours)."""
    neurons = max(layer.neurons for layer in layers)
    rows = bisect_right(range(neurons + 1), room, key=lambda rows: all_tops(layers, rows / neurons)) - 1
    return max(DEFAULT_SPLIT, rows / neurons)


def equal_shares(layers: Sequence[MoeLayer], split: float, room: int, complete: bool = False) -> tuple[LayerPlan, ...]:
    """One slot per layer, round by round from the first layer on, as long as any fits, or only `complete` rounds."""
    rows = [top_rows(layer, split) for layer in layers]
    sizes = np.array([top_bytes(layer, row) for layer, row in zip(layers, rows, strict=True)])
    limits = np.array([layer.num_experts for layer in layers]) * (sizes > 0)
    slots = np.zeros_like(limits)
    while (fits := (slots < limits) & (complete | (sizes <= room))).any():
        rounds = min(room // int(sizes[fits].sum()), int((limits - slots)[fits].min()))
        slots[fits] += rounds
        room -= rounds * int(sizes[fits].sum())
        if complete and not rounds:
            break
        for layer in np.flatnonzero(fits).tolist() if not rounds else ():
            if sizes[layer] <= room:
                slots[layer] += 1
                room -= int(sizes[layer])
    return shares_of(layers, slots.tolist(), rows)


def spend_rest(
    layers: Sequence[MoeLayer], shares: Sequence[LayerPlan], hits: Sequence[NDArray[np.float64]], room: int
) -> tuple[LayerPlan, ...]:
    """More slots for `shares` while any fits into `room`, one by one where it hits most for its bytes.

    `hits[layer]` are the hits of a token with 0 to num_experts slots.
    """
    slots = np.array([share.slots for share in shares])
    sizes = np.array([top_bytes(layer, share.top_rows) for layer, share in zip(layers, shares, strict=True)])
    limits = np.array([layer.num_experts for layer in layers]) * (sizes > 0)
    room -= int((slots * sizes).sum())
    while open_layers := np.flatnonzero((slots < limits) & (sizes <= room)).tolist():
        gains = [hits[layer][slots[layer] + 1] - hits[layer][slots[layer]] for layer in open_layers]
        layer = open_layers[int(np.argmax(gains))]
        slots[layer] += 1
        room -= int(sizes[layer])
    return shares_of(layers, slots.tolist(), [share.top_rows for share in shares])


def least_misses(
    layers: Sequence[MoeLayer], rows: Sequence[int], hits: Sequence[NDArray[np.float64]], room: int
) -> tuple[LayerPlan, ...]:
    """The slots of fewest expected misses, by a dynamic program over the layers: AdapMoE's allocation as we read it
    (arXiv 2408.10284). `rows` are the tops of each layer, `hits` as in `spend_rest`.
    """
    slot_bytes = max(top_bytes(layer, own) for layer, own in zip(layers, rows, strict=True))
    most = max(layer.num_experts for layer in layers)
    num_slots = min(room // slot_bytes, most * len(layers)) if slot_bytes else 0
    unit = max(1, num_slots // MOST_UNITS)  # slots that are handed out together
    slots = [np.minimum(np.arange(0, most + unit, unit), layer.num_experts) for layer in layers]
    curves = np.stack([-hit[slot] for hit, slot in zip(hits, slots, strict=True)])
    units = dynamic_program(curves, num_slots // unit)
    taken = [int(slot[count]) for slot, count in zip(slots, units.tolist(), strict=True)]
    return spend_rest(layers, shares_of(layers, taken, rows), hits, room)
