"""The arithmetic of one expert segment: gate, up, activation, down, and the sum over a token's experts.

Called by `hf.experts`. Every (token, k) pair is accumulated in float32 and the k pairs are added in a
fixed order at the end, so the answer does not depend on which segment arrived first, on cache size or on policy. Knows
nothing of where weights live.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .row_sums import pays_for, sum_rows

Combine = Callable[[Tensor, Tensor], Tensor]  # (gate [t, rows], up [t, rows]) -> [t, rows]


@dataclass(frozen=True)
class ExpertMath:
    """What distinguishes one model family's experts from another's, without naming families."""

    combine: Combine | None  # gated experts
    activation: Callable[[Tensor], Tensor] | None  # ungated experts
    gate_bias: Tensor | None = None  # [experts, neurons]
    up_bias: Tensor | None = None  # [experts, neurons]
    down_bias: Tensor | None = None  # [experts, hidden]

    def prepare(self, x: Tensor) -> Tensor:
        """What `segment` takes for x `[t, hidden]`: x itself, or for one token of gated experts `[2, 2 * hidden]`.

        With x on the block diagonal, one product with the first two thirds of each neuron is gate and up at once. That
        is twice the arithmetic of two products, but weights are what takes the time when there is one token, and they
        are read once, in longer runs (ours; docs/LOG.md).
        """
        if x.shape[0] != 1 or self.combine is None or self.up_bias is not None:
            return x
        doubled = x.new_zeros((4, x.shape[1]))
        doubled[::3] = x
        return doubled.view(2, -1)

    def gather(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """The rows `tokens` `[t]` of hidden_states, and more behind them that are not wanted: `[padded(t), hidden]`.

        For half precision on a CPU oneDNN compiles and keeps a kernel of about 0.4 MB per product and number of rows.
        Prompts would leave hundreds of megabytes of them; few numbers of rows leave few kernels (ours; docs/LOG.md).
        """
        if hidden_states.device.type != "cpu" or hidden_states.dtype == torch.float32:
            return hidden_states[tokens]
        return hidden_states[F.pad(tokens, (0, padded(len(tokens)) - len(tokens)))]

    def segment(self, x: Tensor, weights: Tensor, expert: int, start_row: int) -> Tensor:
        """What neurons from `start_row` on add: x from `prepare` or `gather`, weights `[rows, matrices, hidden]` →
        `[t, hidden]`, or for one token one or more rows whose sum it is.

        Matrices are read with the record's stride; that costs under 10 % against contiguous ones (docs/LOG.md).
        """
        active = self._active(x, weights, expert, start_row)
        if pays_for(active):
            return sum_rows(active.view(-1), weights)
        return torch.mm(active, weights[:, -1])

    def _active(self, x: Tensor, weights: Tensor, expert: int, start_row: int) -> Tensor:
        """What these neurons say, before it is weighed by their columns of `down`: `[t, rows]`."""
        num_rows, _, hidden = weights.shape
        if x.shape[1] != hidden:
            assert self.combine is not None
            gate_and_up = weights.as_strided((num_rows, 2 * hidden), (3 * hidden, 1))
            gate, up = F.linear(x, gate_and_up).chunk(2)
            return self.combine(gate, up)
        rows = slice(start_row, start_row + num_rows)
        up_bias = None if self.up_bias is None else self.up_bias[expert, rows]
        up = F.linear(x, weights[:, -2], up_bias)
        if self.combine is not None:
            gate_bias = None if self.gate_bias is None else self.gate_bias[expert, rows]
            return self.combine(F.linear(x, weights[:, 0], gate_bias), up)
        assert self.activation is not None
        return self.activation(up)


def padded(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 …: at most a third of the rows is in vain."""
    power = 1 << (rows - 1).bit_length()
    return power if rows > power * 3 // 4 else power * 3 // 4


class PairSum:
    """Float32 sums per (token, k) pair, `[tokens, k, hidden]`, filled segment by segment in any order.

    Exact for any order of a pair's two segments, because a + b and b + a round alike. With one token the rows are only
    collected, and added all at once in the end: two operations instead of 2k small ones.
    """

    def __init__(self, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """hidden_states `[tokens, hidden]`, top_k_index `[tokens, k]`."""
        tokens, k = top_k_index.shape
        self.hidden_states = hidden_states
        self.top_k_index = top_k_index
        self.k = k
        self.rows: list[list[Tensor]] = [[] for _ in range(k)] if tokens == 1 else []  # per pair `[parts, hidden]` each
        self.pairs: Tensor | None = None
        if tokens != 1:
            self.pairs = hidden_states.new_zeros((tokens * k, hidden_states.shape[1]), dtype=torch.float32)

    def add(self, y: Tensor, pair_index: Tensor | int) -> None:
        """Adds y from `segment` to the pairs at `pair_index` (`[t]`, or one number when there is one token)."""
        if isinstance(pair_index, int):
            self.rows[pair_index].append(y)
        else:
            assert self.pairs is not None
            only = len(pair_index) == 1
            y = y.sum(0, keepdim=True, dtype=torch.float32) if only else y[: len(pair_index)].float()
            self.pairs.index_add_(0, pair_index, y)

    def total(self, top_k_weights: Tensor, down_bias: Tensor | None) -> Tensor:
        """Weighted sum over k in float32, rounded once: `[tokens, hidden]` in the input's dtype."""
        tokens, hidden = self.hidden_states.shape
        pairs = (self._sum_of_rows() if self.pairs is None else self.pairs).view(tokens, self.k, hidden)
        if down_bias is not None:
            pairs = pairs + down_bias[self.top_k_index].float()
        weights = top_k_weights.float().unsqueeze(1)  # [tokens, 1, k]
        return torch.bmm(weights, pairs).squeeze(1).to(self.hidden_states.dtype)

    def _sum_of_rows(self) -> Tensor:
        """`[k, hidden]` in float32. A pair without any row is zero."""
        num_segments = max(1, *map(len, self.rows))
        if any(len(row) < num_segments for row in self.rows):
            given = next((y for row in self.rows for y in row), self.hidden_states)
            none = torch.zeros_like(given)
            for row in self.rows:
                row.extend([none] * (num_segments - len(row)))
        sums = [torch.stack(part).sum(1, dtype=torch.float32) for part in zip(*self.rows, strict=True)]
        return functools.reduce(torch.add, sums)
