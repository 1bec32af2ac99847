"""Who gets how much of a budget: curves of falling cost, one for each layer, and steps of memory to share among them.

`frontier` calls `fixed_point` for the paper's subproblem 2; `shares` calls `dynamic_program` for AdapMoE's allocation,
and tests as the yardstick. Knows nothing of experts, bytes or seconds. The same curves give the same answer everywhere;
among equals the first layer is served.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_MOVES = 1000  # of one budget; a few are usual

Curves = NDArray[np.float64]  # [layers, steps + 1], cost of each layer with 0, 1, 2 … steps; never rising
Steps = NDArray[np.int64]


def fixed_point(curves: Curves, totals: Steps) -> tuple[Steps, int]:
    """Shares of at most so many steps, for each of `totals` [budgets] by itself: [budgets, layers]; and the most moves
    that a budget took.

    Steps move from the layer that is hurt least to the layer that is helped most, until no move lowers the sum of costs
    (arXiv 2509.08342, subproblem 2). Ours: a move may be of any number of steps, so that it crosses what is not convex,
    and takes first what nobody has; and the start is not equal shares but the steepest jumps of all curves, as many as
    fit, which is the optimum itself where curves are convex. Steps that help nobody are left over.
    """
    allocation = _steepest(curves, totals)
    moving = np.arange(len(totals))
    for moves in range(MAX_MOVES):
        change = _best_moves(curves, allocation[moving], totals[moving])
        allocation[moving] += change
        moving = moving[change.any(axis=1)]
        if not len(moving):
            return allocation, moves
    return allocation, MAX_MOVES


def dynamic_program(curves: Curves, total: int) -> Steps:
    """The allocation [layers] of at most `total` steps with the least sum of costs; exact (ours)."""
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


def _steepest(curves: Curves, totals: Steps) -> Steps:
    """The jumps along the lower convex hulls of all curves, steepest first, up to the first that does not fit into a
    total: [budgets, layers].
    """
    num_layers, width = curves.shape
    layers, spans = np.arange(num_layers), np.arange(1, width)[:, None]
    steps, jumps = np.zeros(num_layers, np.int64), []
    while (steps < width - 1).any():
        gain = _cost(curves, steps) - _cost(curves, steps + spans)  # minus infinity beyond the end
        best = (gain / spans).argmax(axis=0)
        rises = gain[best, layers] > _least_gain(curves)
        jumps.append(np.stack((gain[best, layers] / (best + 1), layers, best + 1))[:, rises])
        steps = np.where(rises, steps + best + 1, width - 1)
    slopes, layer, span = np.concatenate([np.empty((3, 0)), *jumps], axis=1)
    order = (-slopes).argsort(kind="stable")
    layer, span = layer[order].astype(int), span[order].astype(int)
    counts = span.cumsum().searchsorted(totals, side="right").tolist()
    taken = [np.bincount(layer[:count], span[:count], num_layers) for count in counts]
    return np.array(taken, np.int64).reshape(-1, num_layers)


def _best_moves(curves: Curves, allocation: Steps, totals: Steps) -> Steps:
    """For each budget the exchange that lowers the sum of costs most, as a change of `allocation`; zeros for none."""
    budgets, layers = np.arange(len(totals)), np.arange(len(curves))
    spans = np.arange(1, curves.shape[1])
    given = np.maximum(0, spans - (totals - allocation.sum(axis=1))[:, None])  # [budgets, spans]
    here = _cost(curves, allocation)[:, None]
    gain = here - _cost(curves, allocation[:, None] + spans[:, None])  # [budgets, spans, layers]
    loss = _cost(curves, allocation[:, None] - given[..., None]) - here
    giver = loss.argmin(axis=2)
    is_giver = giver[..., None] == layers
    others = np.where(is_giver, np.inf, loss).min(axis=2, keepdims=True)
    least = np.where(is_giver, others, loss.min(axis=2, keepdims=True))  # of any layer but the receiver
    lowered = gain - np.where(given[..., None] > 0, least, 0)
    place, receiver = np.divmod(lowered.reshape(len(totals), -1).argmax(axis=1), len(layers))
    helps = lowered[budgets, place, receiver] > _least_gain(curves)
    loss[budgets, place, receiver] = np.inf
    change = np.zeros_like(allocation)
    change[budgets, loss[budgets, place].argmin(axis=1)] -= given[budgets, place]
    change[budgets, receiver] += spans[place]
    change[~helps] = 0
    return change


def _cost(curves: Curves, steps: Steps) -> NDArray[np.float64]:
    """Of each layer with its `steps` [..., layers]; infinity where it cannot have so many."""
    width = curves.shape[1]
    inside = (steps >= 0) & (steps < width)
    return np.where(inside, curves[np.arange(len(curves)), np.where(inside, steps, 0)], np.inf)


def _least_gain(curves: Curves) -> float:
    """What counts as a gain at all, beside the rounding of sums."""
    return 1e-9 * float(curves[:, 0].max())
