"""Expected seconds of one decoded token, itemised, for any plan on any machine: a closed form of `residency`'s step.

`planner` asks for the times of one layer over all its states, slots and splits at once, and for whole tokens of many
plans at once (`walk`); command line and page show what `predict` says. Stalls are convex in the bytes that arrive
late, so expectations are taken over what tokens of the trace found cached and guessed, never of a mean. More slots, a
faster link or a longer window never make a layer slower. Simulates no chunk and no queue: that is `simulator`.

One layer (ours; the paper's equation is not known): guesses travel in the window between the link's last demand of the
layer before and this router's answer. What is left of right ones is promoted and travels first, then bottoms of cached
tops, then whole experts. Resident segments compute meanwhile, each arriving one after its arrival; the stall is the
longest that any of them keeps computation waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .costs import Breakdown, Costs, LayerCosts
from .geometry import record_stride
from .routing import RoutingTrace, joined
from .spec import LayerPlan, MoeLayer, Plan
from .units import ALIGNMENT_BYTES
from .workload import WARM_UP, Array, Found, Workload, replay, workload


class Pieces(NamedTuple):
    """An expert cut after so many rows: seconds of link and compute, and bytes; arrays of one shape."""

    hit_link_s: Array  # the bottom alone; 0 where a cached top is the whole expert
    miss_link_s: Array
    top_link_s: Array
    hit_bytes: Array
    miss_bytes: Array
    hit_handing_s: Array  # of compute, lost to the transfers of a cached top's bottom
    miss_handing_s: Array
    top_s: Array  # of computing; 0 where there is no such segment
    bottom_s: Array
    admit_s: Array


def pieces(layer: MoeLayer, costs: LayerCosts, machine: Costs, rows: NDArray[np.int64]) -> Pieces:
    """Experts of `layer` with tops of `rows` neurons, in the aligned bytes of `geometry`."""
    cut = rows * layer.row_bytes
    has_top, has_bottom = rows > 0, rows < layer.neurons
    top_bytes = -(-cut // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    bottom_bytes = has_bottom * (record_stride(layer) - cut // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
    top_link_s = top_bytes / machine.link_bytes_per_s + has_top * machine.link_latency_s
    bottom_link_s = bottom_bytes / machine.link_bytes_per_s + has_bottom * machine.link_latency_s
    return Pieces(
        hit_link_s=bottom_link_s,
        miss_link_s=top_link_s + bottom_link_s,
        top_link_s=top_link_s,
        hit_bytes=bottom_bytes.astype(float),
        miss_bytes=(top_bytes + bottom_bytes).astype(float),
        hit_handing_s=has_bottom * costs.transfer_s + bottom_link_s * costs.drag,
        miss_handing_s=(has_top.astype(float) + has_bottom) * costs.transfer_s
        + (top_link_s + bottom_link_s) * costs.drag,
        top_s=has_top * (costs.segment_s + rows * costs.row_s),
        bottom_s=has_bottom * (costs.segment_s + (layer.neurons - rows) * costs.row_s),
        # A whole expert's buffer becomes its slot. (Not if another layer's are larger, which no known model has.)
        admit_s=has_bottom * top_bytes.astype(float) * costs.admit_s,
    )


class LayerTimes(NamedTuple):
    compute_s: Array  # guessing, handing over, segments and admissions; the layer's `step_s` is not in it
    stall_s: Array
    demand_s: Array  # for which the link is busy behind the router's answer
    prefetch_s: Array  # for which it was before
    wasted_s: Array  # of both, with wrong guesses
    late: Array  # 0..1, the part of what was guessed right that had not arrived


def layer_times(size: Pieces, guess_s: float, machine: Costs, found: Found, window_s: Array | float) -> LayerTimes:
    """One layer with `window_s` of link time before its router's answer and `guess_s` of asking the next router.

    All shapes broadcast.
    """
    hits, misses = found.hits - found.guessed_hits, found.misses - found.guessed_misses  # that nobody guessed
    right_s = found.guessed_hits * size.hit_link_s + found.guessed_misses * size.miss_link_s
    wrong_s = found.wrong_hits * size.hit_link_s + (found.wrong - found.wrong_hits) * size.miss_link_s
    whole_s = size.top_s + size.bottom_s
    # Truly the next layer's guesses are handed over here; these stand for them, so that a layer is judged on its own.
    handing_s = (found.hits + found.wrong_hits) * size.hit_handing_s
    handing_s = handing_s + (found.misses + found.wrong - found.wrong_hits) * size.miss_handing_s
    ready_s = (
        guess_s
        + handing_s
        + found.hits * size.top_s
        + found.guessed_hits * size.bottom_s
        + found.guessed_misses * whole_s
        + found.admitted * size.admit_s
    )
    part, late_s, residual_s = _prefetched(size, machine, found, right_s, wrong_s, window_s)
    # Of each run of arrivals the wait for its worst segment, were the link free at the router's answer.
    # The worst of promoted guesses is computed, and admitted if it gets a slot, behind its arrival.
    num_right = np.maximum(1, found.guessed_hits + found.guessed_misses)
    last_s = np.where(size.bottom_s > 0, size.bottom_s, size.top_s) + found.admitted / num_right * size.admit_s
    promoted = last_s - ready_s
    bottoms = size.hit_link_s - ready_s + np.maximum(0, hits - 1) * np.maximum(0, size.hit_link_s - size.bottom_s)
    wholes = (
        hits * (size.hit_link_s - size.bottom_s)
        - ready_s
        + np.maximum(size.top_link_s, size.miss_link_s - size.top_s)
        + np.maximum(0, misses - 1) * np.maximum(0, size.miss_link_s - whole_s)
    )
    demanded = np.where((hits > 0) & (size.hit_link_s > 0), bottoms, -np.inf)
    demanded = np.maximum(demanded, np.where(misses > 0, wholes, -np.inf))
    free_s = residual_s + late_s  # when the link turns to demands
    wait_s = free_s + np.maximum(demanded, np.where(late_s > 0, promoted, -np.inf))
    return LayerTimes(
        compute_s=ready_s + hits * size.bottom_s + misses * whole_s,
        stall_s=np.maximum(0, wait_s),
        demand_s=free_s + hits * size.hit_link_s + misses * size.miss_link_s,
        prefetch_s=part * (right_s + wrong_s),
        wasted_s=part * (right_s + wrong_s) - (right_s - late_s) + residual_s,
        late=np.divide(late_s, right_s, out=np.zeros_like(late_s), where=right_s > 0),
    )


def _prefetched(
    size: Pieces, machine: Costs, found: Found, right_s: Array, wrong_s: Array, window_s: Array | float
) -> tuple[Array, Array, Array]:
    """The part of all guesses that travels in the window; link seconds of right ones behind it, and of a wrong one's
    chunk under way.
    """
    guessed_s = right_s + wrong_s
    sent_s = np.minimum(window_s, guessed_s)
    part = np.divide(sent_s, guessed_s, out=np.ones_like(sent_s), where=guessed_s > 0)
    # Right guesses stand early in the list, but no link carries more of them than it carries.
    skew = np.minimum(found.skew, np.divide(wrong_s, right_s, out=np.zeros_like(guessed_s), where=right_s > 0))
    late_s = right_s * (1 - part) * (1 - skew * part)
    # One guess is under way; where it is a wrong one, half of its chunk is left on average.
    num_wrong = found.wrong - found.wrong_hits * (size.hit_link_s == 0)
    num_guessed = found.guessed_hits + found.guessed_misses + found.wrong
    chunk_s = np.minimum(machine.chunk_bytes / machine.link_bytes_per_s, size.miss_link_s)
    residual_s = np.where(part < 1, num_wrong / np.maximum(1, num_guessed) * chunk_s / 2, 0)
    return part, late_s, residual_s


@dataclass(frozen=True, eq=False)
class Walk:
    """Sums over the layers and means over the tokens, of every plan: [plans]."""

    total_s: Array
    windows: Array  # [layers, plans, tokens], seconds
    # Zero unless they were asked for
    experts_s: Array
    stall_s: Array
    link_s: Array
    link_bytes: Array
    wasted_s: Array
    outcomes: Array  # [plans, 3], hits, partial hits, misses; per token


def walk(
    work: Workload,
    layers: Sequence[MoeLayer],
    costs: Costs,
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    itemised: bool = False,
) -> Walk:
    """Tokens of `work` through all layers under plans of `slots` and `rows`, both [plans, layers].

    Each token follows upon itself: the window of its first layer is that behind its last.
    """
    num_layers, num_plans = len(layers), len(slots)
    slots = np.where(rows > 0, slots, 0)
    neurons = np.array([layer.neurons for layer in layers])
    resident = (rows == neurons) & (slots == [layer.num_experts for layer in layers])  # [plans, layers]
    windows = np.zeros((num_layers, num_plans, work.num_tokens))
    total_s = np.full(num_plans, sum(layer.before_s + layer.step_s for layer in costs.layers) + costs.after_s)
    experts_s, stall_s, link_s, link_bytes, wasted_s = np.zeros((5, num_plans))
    outcomes = np.zeros((num_plans, 3))
    # The last two layers run twice: first only to find the window of the first one.
    for position, layer in enumerate([*range(max(0, num_layers - 2), num_layers), *range(num_layers)]):
        following, cost = (layer + 1) % num_layers, costs.layers[layer]
        size = Pieces(*(part[:, None] for part in pieces(layers[layer], cost, costs, rows[:, layer])))
        found = work.layers[layer].found(slots[:, layer])
        guess_s = (~resident[:, following, None]) * (cost.guess_s if work.depth else 0.0)
        times = layer_times(size, guess_s, costs, found, windows[layer])
        busy_s = times.compute_s + times.stall_s
        before_s = costs.layers[following].before_s + (costs.after_s if following == 0 else 0.0)
        windows[following] = busy_s + (cost.step_s + before_s) - np.maximum(times.demand_s, guess_s)
        if position < min(2, num_layers):
            continue
        total_s += busy_s.mean(axis=1)
        if itemised:
            experts_s += times.compute_s.mean(axis=1) + cost.step_s
            stall_s += times.stall_s.mean(axis=1)
            link_s += (times.demand_s + times.prefetch_s).mean(axis=1)
            wasted_s += times.wasted_s.mean(axis=1)
            needed = found.hits * size.hit_bytes + found.misses * size.miss_bytes
            link_bytes += (needed + times.wasted_s * costs.link_bytes_per_s).mean(axis=1)
            outcomes += _outcomes(size, found, times).mean(axis=2).T
    return Walk(total_s, windows, experts_s, stall_s, link_s, link_bytes, wasted_s, outcomes)


def _outcomes(size: Pieces, found: Found, times: LayerTimes) -> Array:
    """Hits, partial hits and misses as `residency` counts them: [3, plans, tokens]."""
    travels, has_top = size.hit_link_s > 0, size.top_s > 0
    guessed_hits = found.guessed_hits * travels
    num_right = guessed_hits + found.guessed_misses
    # Where guesses are late, one of them is under way, half of it on average.
    here = np.where(times.late > 0, np.maximum(0, num_right * (1 - times.late) - 0.5), num_right)
    cached = found.hits * has_top
    hits = here + cached * ~travels
    partial = cached * travels - here * guessed_hits / np.maximum(1, num_right)
    return np.stack((hits, partial, found.hits + found.misses - hits - partial))


def predict(
    plan: Plan,
    layers: Sequence[MoeLayer],
    costs: Costs,
    trace: RoutingTrace,
    *,
    warm_up: int | None = None,
    earlier: RoutingTrace | None = None,
) -> Breakdown:
    """What a token of `trace` after the first `warm_up` ones (None: a quarter) is expected to cost under `plan`, with
    caches that knew `earlier` tokens. For many plans make the workload once and `walk`.
    """
    depth = plan.prefetch_depth if plan.predictor != "none" else 0
    known = trace if earlier is None else joined(earlier, trace)
    start = known.num_tokens - trace.num_tokens + (int(WARM_UP * trace.num_tokens) if warm_up is None else warm_up)
    work = workload(replay(known, plan.eviction, plan.predictor, costs.guess_accuracy), depth, start=start)
    return breakdown(walk(work, layers, costs, *table(plan.layers), itemised=True), 0, costs)


def table(*plans: Sequence[LayerPlan]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slots and rows of plans, both [plans, layers], as `walk` wants them."""
    slots = np.array([[share.slots for share in plan] for plan in plans])
    return slots, np.array([[share.top_rows for share in plan] for plan in plans])


def breakdown(result: Walk, plan: int, costs: Costs) -> Breakdown:
    """Of one of the plans that were walked, by its row."""
    outcomes = result.outcomes[plan] / max(1e-9, result.outcomes[plan].sum())
    return Breakdown(
        before_s=sum(layer.before_s for layer in costs.layers),
        experts_s=float(result.experts_s[plan]),
        stall_s=float(result.stall_s[plan]),
        after_s=costs.after_s,
        link_s=float(result.link_s[plan]),
        hit_rate=float(outcomes[0]),
        partial_hit_rate=float(outcomes[1]),
        miss_rate=float(outcomes[2]),
        link_bytes=float(result.link_bytes[plan]),
        wasted_s=float(result.wasted_s[plan]),
    )
