"""Who gets how much of a budget: curves of falling cost, one for each layer, and steps of memory to share among them.

`frontier` calls it for the paper's subproblem 2, `shares` for AdapMoE's allocation. The paper (arXiv 2509.08342) moves
steps from the layer that is hurt least to the layer that is helped most until nothing improves; where curves are not
convex such moves end at a worse point than they could, and the exact answer for all budgets at once costs less (ours).
Knows nothing of experts, bytes or seconds. Among equals the last layer takes the fewest steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dynamic_program(curves: NDArray[np.float64], totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """The steps of each layer that cost least, for each of `totals` to hand out at most: [totals, layers].

    `curves` [layers, steps + 1] are the costs of each layer with 0, 1, 2 … steps.
    """
    num_layers, width = curves.shape
    most = int(totals.max())
    least = np.zeros(most + 1)  # of the layers so far, with 0..most steps
    taken = np.zeros((num_layers, most + 1), np.int64)
    for layer, curve in enumerate(curves):
        sums = np.full((min(width, most + 1), most + 1), np.inf)
        for steps in range(len(sums)):
            sums[steps, steps:] = curve[steps] + least[: most + 1 - steps]
        taken[layer] = sums.argmin(axis=0)
        least = sums.min(axis=0)
    allocation = np.zeros((len(totals), num_layers), np.int64)
    for layer in reversed(range(num_layers)):
        allocation[:, layer] = taken[layer, totals]
        totals = totals - allocation[:, layer]
    return allocation
