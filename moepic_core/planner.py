"""From what the user wants and what the model needs to a `Plan`. Pure: no torch, no clock, no file.

`uniform_plan` gives every layer the same split ratio and the same share of the cache. It is the paper's system without
its configurator (arXiv 2509.08342); a planner that sets each layer's share by itself produces the same `Plan`, which is
the only way into the engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BadSettings, OutOfRoom
from .geometry import record_stride, top_bytes, top_rows
from .spec import STRATEGIES, LayerPlan, MemoryPlan, MoeLayer, Plan, Settings
from .units import format_bytes, parse_bytes

DEFAULT_SPLIT = 0.4  # best uniform ratio in the paper's preliminary study (Qwen1.5-MoE)
HEADROOM = 0.9  # part of the free memory that budgets may take: a device filled to the brim slows down or fails
SMALLEST_STAGING = 2  # records: one is computed with while the next arrives


@dataclass(frozen=True)
class Needs:
    """Device bytes that a model takes before any expert is cached."""

    layers: tuple[MoeLayer, ...]
    top_k: int
    resident: int
    kv: int
    workspace: int

    @property
    def record(self) -> int:
        """Bytes of one staging buffer."""
        return max(record_stride(layer) for layer in self.layers)

    @property
    def fixed(self) -> int:
        return self.resident + self.kv + self.workspace

    @property
    def smallest(self) -> int:
        """The least budget with which anything runs: no expert cached, two staging buffers."""
        return self.fixed + SMALLEST_STAGING * self.record

    @property
    def everything(self) -> int:
        """The budget with which all experts are resident: 100 %."""
        return self.fixed + self.staging_records * self.record + _all_tops(self.layers, 1.0)

    @property
    def staging_records(self) -> int:
        """Room for the experts that two layers use for one token."""
        return max(SMALLEST_STAGING, 2 * self.top_k)


def budget_bytes(vram: str | int, needs: Needs, free_bytes: int) -> int:
    """The budget in bytes. `auto`: what is free, but not more than everything. `50%`: of what everything needs.

    Raises OutOfRoom below the smallest possible budget, and names it.
    """
    if isinstance(vram, str) and vram.strip().lower() == "auto":
        budget = min(free_bytes, needs.everything)
    elif isinstance(vram, str) and vram.strip().endswith("%"):
        budget = int(_percent(vram) * needs.everything)
    else:
        budget = parse_bytes(vram)
    if budget < needs.smallest:
        raise OutOfRoom(
            f"a budget of {format_bytes(budget)} is too small for this model: the smallest is "
            f"{format_bytes(needs.smallest)} ({needs.smallest} bytes: weights outside the experts "
            f"{format_bytes(needs.resident)}, KV {format_bytes(needs.kv)}, workspace {format_bytes(needs.workspace)}, "
            f"staging {format_bytes(SMALLEST_STAGING * needs.record)}); raise the budget or shorten the context"
        )
    return budget


def uniform_plan(settings: Settings, needs: Needs, budget: int) -> Plan:
    """The same split ratio and share of the cache for every layer, under `budget` bytes.

    Staging gets its full size before the cache gets anything, since without it nothing overlaps.
    """
    strategy = STRATEGIES[settings.strategy]
    staging = min(needs.staging_records, (budget - needs.fixed) // needs.record)
    assert staging >= SMALLEST_STAGING, (staging, budget, needs)
    room = budget - needs.fixed - needs.staging_records * needs.record if strategy.allocation == "uniform" else 0
    wanted = settings.split if settings.split is not None else strategy.split
    split = _roomiest_split(needs.layers, room) if wanted is None else wanted
    shares = _share(needs.layers, split, room)
    cache = sum(
        share.slots * top_bytes(layer, share.top_rows) for layer, share in zip(needs.layers, shares, strict=True)
    )
    prefetch = strategy.predictor != "none" if settings.prefetch == "auto" else settings.prefetch == "on"
    return Plan(
        layers=shares,
        staging_records=staging,
        eviction=strategy.eviction if settings.eviction == "auto" else settings.eviction,
        predictor="next-router" if prefetch else "none",
        prefetch_depth=min(needs.top_k, staging - 1) if prefetch else 0,
        misses=strategy.misses,
        memory=MemoryPlan(needs.resident, needs.kv, needs.workspace, staging * needs.record, cache, budget),
        strategy=strategy.name,
        reason=_reason(strategy.name, split, shares, needs, wanted is not None),
    )


def _roomiest_split(layers: Sequence[MoeLayer], room: int) -> float:
    """The default ratio, or the largest with which all tops fit: room that is left over makes tops longer (ours)."""
    neurons = max(layer.neurons for layer in layers)
    rows = bisect_right(range(neurons + 1), room, key=lambda rows: _all_tops(layers, rows / neurons)) - 1
    return max(DEFAULT_SPLIT, rows / neurons)


def _all_tops(layers: Sequence[MoeLayer], split: float) -> int:
    """Bytes that the tops of all experts take."""
    return sum(layer.num_experts * top_bytes(layer, top_rows(layer, split)) for layer in layers)


def _share(layers: Sequence[MoeLayer], split: float, room: int) -> tuple[LayerPlan, ...]:
    """One slot per layer, round by round from the first layer on, as long as any fits."""
    rows = [top_rows(layer, split) for layer in layers]
    sizes = [top_bytes(layer, row) for layer, row in zip(layers, rows, strict=True)]
    slots, before = [0] * len(layers), -1
    while room != before:
        before = room
        for position, layer in enumerate(layers):
            if slots[position] < layer.num_experts and 0 < sizes[position] <= room:
                slots[position] += 1
                room -= sizes[position]
    return tuple(
        LayerPlan(count, row, row / layer.neurons) for layer, row, count in zip(layers, rows, slots, strict=True)
    )


def _percent(text: str) -> float:
    number = text.strip()[:-1].strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise BadSettings(f"budget {text!r} is not understood; a percentage is above 0 and at most 100, such as 50%")
    return value / 100


def _reason(name: str, split: float, shares: Sequence[LayerPlan], needs: Needs, asked: bool) -> str:
    slots, experts = sum(share.slots for share in shares), sum(layer.num_experts for layer in needs.layers)
    if not slots:
        return f"{name}: no expert is cached, every use streams from the host"
    if slots == experts and split >= 1:
        return f"{name}: all {experts} experts are resident"
    grown = "the paper's best uniform ratio" if split == DEFAULT_SPLIT else "all tops fit, so tops grew"
    why = "as the strategy or the settings say" if asked else grown
    return f"{name}: {slots} of {experts} tops cached, split ratio {split:.2f} everywhere ({why})"
