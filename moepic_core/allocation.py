"""Who gets how much of a budget: curves of falling cost, one for each layer, and steps of memory to share among them.

`planner` calls `fixed_point` for the paper's subproblem 2 and `dynamic_program` for AdapMoE's allocation and as the
yardstick. Knows nothing of experts, bytes or seconds. The same curves give the same answer everywhere; among equals
the first layer is served.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_MOVES = 10_000  # never reached: each move lowers the total

Curves = NDArray[np.float64]  # [layers, steps + 1], cost of each layer with 0.. steps; never rising
Steps = NDArray[np.int64]  # [layers]


def fixed_point(curves: Curves, allocation: Steps, free: int) -> tuple[Steps, int]:
    """Hands out `free` steps on top of `allocation`, then moves steps from the layer that is hurt least to the layer
    that is helped most, until no move of any span lowers the total (arXiv 2509.08342, subproblem 2). Returns the
    allocation and the number of moves.

    Beyond the paper a layer may also collect the steps of one jump from several others, one each, or give them so.
    Steps that help nobody are not handed out.
    """
    allocation = allocation.copy()
    for moves in range(MAX_MOVES):
        change = _best_gift(curves, allocation, free) if free else None
        if change is None:
            change = _best_move(curves, allocation)
        if change is None:
            return allocation, moves
        allocation += change
        free -= int(change.sum())
    raise AssertionError(f"no fixed point within {MAX_MOVES} moves")


def dynamic_program(curves: Curves, total: int) -> Steps:
    """The allocation of at most `total` steps with the least sum of costs; exact (ours)."""
    num_layers, width = curves.shape
    least = np.zeros(total + 1)  # of the layers so far, with 0..total steps
    taken = np.zeros((num_layers, total + 1), np.int64)
    for layer, curve in enumerate(curves):
        sums = np.full((min(width, total + 1), total + 1), np.inf)
        for steps in range(len(sums)):
            sums[steps, steps:] = curve[steps] + least[: total + 1 - steps]
        taken[layer] = sums.argmin(axis=0)
        least = sums.min(axis=0)
    allocation = np.zeros(num_layers, np.int64)
    for layer in reversed(range(num_layers)):
        allocation[layer] = taken[layer, total]
        total -= allocation[layer]
    return allocation


def _best_gift(curves: Curves, allocation: Steps, free: int) -> Steps | None:
    """The jump of at most `free` steps that helps most for each step; None where nothing helps."""
    spans = np.arange(1, min(free, curves.shape[1] - 1) + 1)
    gain = _gains(curves, allocation, spans) / spans[:, None]
    span, layer = np.unravel_index(gain.argmax(), gain.shape)
    if gain[span, layer] <= _least_gain(curves):
        return None
    change = np.zeros_like(allocation)
    change[layer] = spans[span]
    return change


def _best_move(curves: Curves, allocation: Steps) -> Steps | None:
    """The exchange that lowers the total most: between two layers, or between one and the next best of all others."""
    spans = np.arange(1, curves.shape[1])  # jumps cross what is not convex
    gain, loss = _gains(curves, allocation, spans), -_gains(curves, allocation, -spans)
    moves = (
        gain - _least_other(loss),
        gain - _least_of_others(loss[0], spans),
        -loss - _least_of_others(-gain[0], spans),
    )
    best = [int(values.argmax()) for values in moves]
    lowered = [values.flat[place] for values, place in zip(moves, best, strict=True)]
    kind = int(np.argmax(lowered))
    if lowered[kind] <= _least_gain(curves):
        return None
    place, layer = np.unravel_index(best[kind], gain.shape)
    change, span = np.zeros_like(allocation), int(spans[place])
    costs = (loss[place], loss[0], -gain[0])[kind]
    others = [other for other in costs.argsort(kind="stable").tolist() if other != layer]
    others, sign = (others[:1], span) if kind == 0 else (others[:span], 1 if kind == 1 else -1)
    change[layer], change[others] = (span if kind < 2 else -span), -sign
    return change


def _gains(curves: Curves, allocation: Steps, spans: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much `spans` more steps lower each layer's cost: [spans, layers], minus infinity where it has no room."""
    steps = allocation + spans[:, None]
    here, layers = (steps >= 0) & (steps < curves.shape[1]), np.arange(len(curves))
    return np.where(here, curves[layers, allocation] - curves[layers, np.where(here, steps, 0)], -np.inf)


def _least_other(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least cost [spans, layers] of any layer but one: [spans, layers], infinity where there is no other."""
    first = cost.argmin(axis=1)[:, None] == np.arange(cost.shape[1])
    second = np.where(first, np.inf, cost).min(axis=1, keepdims=True)
    least: NDArray[np.float64] = np.where(first, second, cost.min(axis=1, keepdims=True))
    return least


def _least_of_others(cost: NDArray[np.float64], spans: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of the least `span` costs [layers] of all layers but one: [spans, layers], infinity for too few."""
    order = cost.argsort(kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(cost))
    finite = np.where(np.isfinite(cost), cost, 1e300)
    sums = np.concatenate(([0.0], finite[order].cumsum(), np.full(int(spans[-1]), np.inf)))
    return np.where(place >= spans[:, None], sums[spans][:, None], sums[spans + 1][:, None] - finite)


def _least_gain(curves: Curves) -> float:
    """What counts as a gain at all, beside the rounding of sums."""
    return 1e-9 * float(curves[:, 0].max())
