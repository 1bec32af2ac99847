"""The paper's subproblem 1: how a layer best spends its budget, as slots × top, for every budget and window at once.

`planner` makes one `LayerOptions` per layer and asks it again whenever plans of the other layers have changed the
link time before this layer. Tops fill their budget: b bytes and C slots give rows of b/C bytes. Expected times are
those of `cost_model.layer_times` over the states of the trace's tokens, interpolated between splits and windows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cost_model import Pieces, layer_times, pieces
from .costs import Costs
from .geometry import top_bytes
from .spec import MoeLayer
from .units import ALIGNMENT_BYTES
from .workload import Array, Found, LayerTokens, Workload

NUM_SPLITS = 16  # between 0 and 1, that times are computed for
WINDOWS = np.array((0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1))  # of the time that all guesses take at most


class Best(NamedTuple):
    """A layer's answers to budgets of 0, 1, 2 … steps: [cases, steps + 1]."""

    seconds: Array  # of computing and stalling, never rising
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]


class LayerOptions:
    """All ways to spend 0 to `num_steps` steps of `step_bytes` in `layer`, and what each is expected to cost."""

    def __init__(
        self,
        work: Workload,
        number: int,
        layer: MoeLayer,
        costs: Costs,
        step_bytes: int,
        num_steps: int,
        rows: int | None,
    ) -> None:
        """`rows` fixes the tops, as a setting or a strategy does."""
        if rows is None:
            self.rows = _filling_rows(layer, step_bytes, num_steps)
        else:
            self.rows = _fixed_rows(layer, rows, step_bytes, num_steps)
        columns = _columns(layer, rows)
        size = pieces(layer, costs.layers[number], costs, columns)
        guess_s = costs.layers[number].guess_s if work.depth else 0.0
        self.windows = WINDOWS * work.depth * size.miss_link_s.max() if work.depth else np.zeros(1)
        seconds = _expected(size, guess_s, costs, work.layers[number], self.windows)
        # Nobody asks the router of a layer whose experts are all resident.
        seconds[:, -1, columns == layer.neurons] -= costs.layers[number - 1].guess_s if work.depth else 0.0
        self.seconds = _interpolated(seconds, columns, layer.neurons, self.rows)  # [windows, budgets, slots]

    def best(self, windows_s: Array) -> Best:
        """The best of every budget in cases when tokens leave these windows [cases, tokens]; the fewest slots among
        equals.
        """
        shares = _weights(self.windows, windows_s)
        seconds = (shares @ self.seconds.reshape(len(self.windows), -1)).reshape(-1, *self.rows.shape)
        seconds[:, self.rows < 0] = np.inf
        slots = seconds.argmin(axis=2)  # [cases, budgets]
        least = seconds.min(axis=2)
        # A larger budget may leave some unused.
        budgets = np.arange(slots.shape[1])
        source = np.maximum.accumulate(np.where(least <= np.minimum.accumulate(least, axis=1), budgets, 0), axis=1)
        slots = np.take_along_axis(slots, source, 1)
        return Best(np.take_along_axis(least, source, 1), slots, self.rows[source, slots])


def _filling_rows(layer: MoeLayer, step_bytes: int, num_steps: int) -> NDArray[np.int64]:
    """The longest tops of which `slots` fit into a budget: [budgets, slots], -1 where there is no such option."""
    budgets = np.arange(num_steps + 1)[:, None] * step_bytes
    slots = np.arange(layer.num_experts + 1)
    slot_bytes = budgets // np.maximum(1, slots) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    rows = np.minimum(slot_bytes // layer.row_bytes, layer.neurons)
    return np.where(slots > 0, np.where(rows > 0, rows, -1), 0)


def _fixed_rows(layer: MoeLayer, rows: int, step_bytes: int, num_steps: int) -> NDArray[np.int64]:
    budgets = np.arange(num_steps + 1)[:, None] * step_bytes
    slots = np.arange(layer.num_experts + 1)
    fits = (slots * top_bytes(layer, rows) <= budgets) & ((slots == 0) | (rows > 0))
    return np.where(fits, rows, -1)


def _columns(layer: MoeLayer, rows: int | None) -> NDArray[np.int64]:
    """Lengths of tops to compute times for; between 0, 1 and the last but one, all, a cut costs a segment more."""
    if rows is not None:
        return np.array([rows])
    between = np.linspace(1, max(1, layer.neurons - 1), NUM_SPLITS).round().astype(int)
    return np.unique(np.concatenate(([0, layer.neurons], between)))


def _expected(size: Pieces, guess_s: float, costs: Costs, tokens: LayerTokens, windows_s: Array) -> Array:
    """Seconds of computing and stalling: [windows, slots, columns]."""
    states, share = _states(tokens)
    hits, guessed_hits, misses, guessed_misses, wrong, skew = states[:, :, None]
    wrong_hits = wrong * hits / np.maximum(1, hits + misses)  # as likely cached as any expert of such a token
    found = Found(hits, guessed_hits, misses, guessed_misses, guessed_misses, wrong, wrong_hits, skew)
    times = layer_times(size, guess_s, costs, found, windows_s[:, None, None])
    seconds: Array = share @ (times.compute_s + times.stall_s)
    return seconds


def _states(tokens: LayerTokens) -> tuple[Array, Array]:
    """Distinct states [6, states] and the share of tokens in each at every number of slots [slots, states]."""
    num_slots, num_tokens = tokens.hits.shape
    kinds, first, kind = np.unique(
        np.stack((tokens.uses, tokens.right, tokens.wrong)), axis=1, return_index=True, return_inverse=True
    )
    wide = int(tokens.uses.max()) + 1
    num_codes = len(first) * wide * wide
    codes = (kind.reshape(-1) * wide + tokens.hits) * wide + tokens.guessed_hits  # [slots, tokens]
    places = np.arange(num_slots)[:, None] * num_codes + codes
    counts = np.bincount(places.ravel(), minlength=num_slots * num_codes).reshape(num_slots, num_codes)
    seen = np.flatnonzero(counts.any(axis=0))
    kind, hits, guessed_hits = np.unravel_index(seen, (len(first), wide, wide))
    uses, right, wrong = kinds[:, kind]
    skew = tokens.skew[first[kind]]  # equal for equally right lists
    return np.stack((hits, guessed_hits, uses - hits, right - guessed_hits, wrong, skew)), counts[:, seen] / num_tokens


def _interpolated(seconds: Array, columns: NDArray[np.int64], neurons: int, rows: NDArray[np.int64]) -> Array:
    """`seconds` [windows, slots, columns] at `rows` [budgets, slots]: [windows, budgets, slots], anything at -1."""
    low = columns.searchsorted(np.maximum(rows, columns[0]), side="right") - 1
    last = max(0, len(columns) - (2 if columns[-1] == neurons else 1))  # nothing lies between the last cut and a whole
    high = np.where((low > 0) & (low < last), low + 1, low)
    part = (rows - columns[low]) / np.maximum(1, columns[high] - columns[low])
    slots = np.arange(rows.shape[1])
    between: Array = seconds[:, slots, low] * (1 - part) + seconds[:, slots, high] * part
    return between


def _weights(grid: Array, values: Array) -> Array:
    """Shares [cases, grid] of the grid's points in the means of a function that is linear between them, over `values`
    [cases, any].
    """
    cases, size = np.arange(len(values))[:, None], len(grid)
    place = np.interp(values, grid, np.arange(size))
    low = np.minimum(place.astype(int), max(0, size - 2))
    part = place - low
    index = cases * size + low
    weights = np.bincount(index.ravel(), weights=(1 - part).ravel(), minlength=len(values) * size)
    if size > 1:
        weights += np.bincount((index + 1).ravel(), weights=part.ravel(), minlength=len(values) * size)
    shares: Array = weights.reshape(-1, size) / values.shape[1]
    return shares
