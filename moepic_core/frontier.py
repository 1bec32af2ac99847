"""The best plans of a growing budget: the paper's configurator (arXiv 2509.08342), run along the whole slider.

`planner` makes one frontier per trace and asks it for any budget. Each level of memory is shared among the layers by
what it saves there (subproblems 1 and 2: `split_search`, `allocation`). Shares and the link time before each layer
depend on each other, so levels are planned, walked, and planned anew with the windows that came out, until no level
gains. A level that turned out worse than a smaller one is answered with the smaller one: more memory never predicts
slower. Knows layers, slots and seconds; what else takes memory is the planner's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .allocation import fixed_point
from .cost_model import Walk, walk
from .costs import Costs
from .geometry import record_stride, top_bytes
from .spec import MoeLayer
from .split_search import LayerOptions
from .workload import Array, Workload

STEPS_PER_LAYER = 16  # a step is this part of a layer, in whole experts where it has that many
MAX_LEVELS = 256
NUM_SEGMENTS = 8  # of the slider; levels of one segment are planned with the same windows
MAX_ROUNDS = 4
WORTH = 1e-3  # of a token's time: what another round must gain somewhere

Ints = NDArray[np.int64]


class Levels(NamedTuple):
    """Plans of levels of memory. Row 0 has none; each next one has `level_bytes` more."""

    slots: Ints  # [levels, layers]
    rows: Ints  # [levels, layers]
    seconds: Array  # [levels], of a token
    rounds: int  # until no level gained
    settled: bool  # False where MAX_ROUNDS ended it


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best of all ways to prefetch at each level; `seconds` never rise."""

    level_bytes: int
    ways: tuple[Levels, ...]
    way: Ints  # [levels], which of `ways` is the best one
    source: Ints  # [levels], and at which level

    def best(self, room: int) -> tuple[Levels, int, int]:
        """The best plan for `room` bytes: the way it belongs to, its row there, and the number of the way."""
        level = min(room // self.level_bytes, len(self.way) - 1)
        return self.ways[self.way[level]], int(self.source[level]), int(self.way[level])


def frontier(
    works: Sequence[Workload],
    layers: Sequence[MoeLayer],
    costs: Costs,
    room: int,
    rows: Sequence[int] | None = None,
    steps_per_layer: int = STEPS_PER_LAYER,
) -> Frontier:
    """Plans for at least all levels up to `room` bytes of cache, for the best of `works`: the same tokens with more or
    fewer guesses. `rows` fixes every layer's tops.
    """
    step_bytes = _step_bytes(layers, steps_per_layer)
    num_steps = -(-max(layer.layer_bytes for layer in layers) // step_bytes)
    stride = -(-num_steps * len(layers) // MAX_LEVELS)
    levels = np.arange(0, num_steps * len(layers) + stride, stride)
    segments = np.arange(len(levels)) * min(NUM_SEGMENTS, len(levels)) // len(levels)
    # Whole segments, whatever the room: a level is planned alike for every budget above it.
    levels = levels[segments <= segments[min(room // (stride * step_bytes), len(levels) - 1)]]
    ways = tuple(
        _levels(work, layers, costs, rows, step_bytes, num_steps, levels, segments[: len(levels)]) for work in works
    )
    seconds = np.stack([each.seconds for each in ways])
    least = seconds.min(axis=0)
    source = np.maximum.accumulate(np.where(least <= np.minimum.accumulate(least), np.arange(len(least)), 0))
    return Frontier(stride * step_bytes, ways, seconds.argmin(axis=0)[source], source)


def _levels(
    work: Workload,
    layers: Sequence[MoeLayer],
    costs: Costs,
    fixed: Sequence[int] | None,
    step_bytes: int,
    num_steps: int,
    levels: Ints,
    segments: Ints,
) -> Levels:
    """Plans of all levels for one way to prefetch."""
    options = [
        LayerOptions(work, number, layer, costs, step_bytes, num_steps, None if fixed is None else fixed[number])
        for number, layer in enumerate(layers)
    ]
    middles = np.array([int(np.flatnonzero(segments == segment).mean()) for segment in range(segments[-1] + 1)])
    start = walk(work, layers, costs, *_equal(layers, fixed, levels[middles] * step_bytes)).windows

    def result_of(windows: Array) -> Walk:
        return walk(work, layers, costs, *_planned(options, levels[middles], segments[middles], windows))

    windows, rounds, settled = _agreed(start, result_of)
    slots, rows = _planned(options, levels, segments, windows)
    return Levels(slots, rows, walk(work, layers, costs, slots, rows).total_s, rounds, settled)


def _agreed(windows: Array, result_of: Callable[[Array], Walk]) -> tuple[Array, int, bool]:
    """Windows [layers, segments, tokens] that agree with the plans which they lead to, as far as that pays; the number
    of rounds, and whether they ended by themselves. A segment that does not gain keeps its best windows for good.
    """
    best, rounds = windows, 0
    least_s, gains = np.full(windows.shape[1], np.inf), np.ones(windows.shape[1], bool)
    while gains.any() and rounds < MAX_ROUNDS:
        rounds += 1
        result = result_of(windows)
        gains &= result.total_s < (1 - WORTH) * least_s
        best = np.where(gains[:, None], windows, best)
        least_s = np.where(gains, result.total_s, least_s)
        windows = np.where(gains[:, None], result.windows, best)
    return best, rounds, not gains.any()


def _planned(options: Sequence[LayerOptions], levels: Ints, segments: Ints, windows: Array) -> tuple[Ints, Ints]:
    """Slots and rows of all levels, [levels, layers], with the windows [layers, segments, tokens]."""
    best = [option.best(own) for option, own in zip(options, windows, strict=True)]
    curves, of_slots, of_rows = (np.stack(parts, axis=1) for parts in zip(*best, strict=True))
    layers, found = np.arange(len(options)), []
    for segment, own in enumerate(curves):
        steps, _ = fixed_point(own, levels[segments == segment])
        found.append((of_slots[segment, layers, steps], of_rows[segment, layers, steps]))
    slots, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return slots, rows


def _equal(layers: Sequence[MoeLayer], fixed: Sequence[int] | None, rooms: Ints) -> tuple[Ints, Ints]:
    """The same bytes for every layer under each of `rooms`, cut in the middle: where the search for windows starts."""
    rows = [max(1, layer.neurons // 2) for layer in layers] if fixed is None else fixed
    sizes = np.array([top_bytes(layer, own) for layer, own in zip(layers, rows, strict=True)])
    slots = rooms[:, None] // len(layers) // np.maximum(1, sizes)
    slots = np.minimum(slots, [layer.num_experts for layer in layers])
    return slots, np.broadcast_to(rows, slots.shape)


def _step_bytes(layers: Sequence[MoeLayer], steps_per_layer: int) -> int:
    """Of the largest layer: whole experts, or an even part of one."""
    layer = max(layers, key=lambda layer: layer.layer_bytes)
    experts = -(-layer.num_experts // steps_per_layer)
    parts = max(1, steps_per_layer // layer.num_experts)
    return -(-experts * record_stride(layer) // parts)
