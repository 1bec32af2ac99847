"""Next-router prediction: the next MoE layer's experts, as guessed by its own router, become a prefetch list.

`residency` runs the next layer's router early and hands over the experts in order of score; `propose` returns them with
the probability that each is right, `observe` hears what the router then chose and keeps score per layer and rank.
Only decode steps are scored: in prefill almost every expert is needed, so callers simply do not call.
No tensor comes in here and nothing is fetched; what a guess is worth fetching is its caller's decision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Guess(NamedTuple):
    """One expert that the next step of a layer may activate."""

    expert: int
    rank: int  # 0 for the router's best score
    probability: float  # that the layer activates it


class Predictor:
    """Accuracy per (layer, rank), and at most one open prediction per layer."""

    def __init__(self, num_layers: int, max_depth: int) -> None:
        self._max_depth = max_depth
        self._right = [[0] * max_depth for _ in range(num_layers)]
        self._total = [[0] * max_depth for _ in range(num_layers)]
        self._open: list[tuple[int, ...]] = [()] * num_layers

    def propose(self, layer: int, ranked: Sequence[int]) -> list[Guess]:
        """Guesses for `layer` from its distinct experts, best score first, at most max_depth of them.

        The probability is Laplace's rule of succession, (right + 1) / (total + 2): one half before the first sample,
        never 0 or 1, the measured accuracy soon after. The list becomes the open prediction of `layer` and replaces
        one that was never observed.
        """
        assert len(ranked) <= self._max_depth, f"{len(ranked)} guesses for layer {layer}, at most {self._max_depth}"
        self._open[layer] = tuple(ranked)
        right, total = self._right[layer], self._total[layer]
        return [Guess(expert, rank, (right[rank] + 1) / (total[rank] + 2)) for rank, expert in enumerate(ranked)]

    def observe(self, layer: int, actual: Collection[int]) -> tuple[int, ...]:
        """The router of `layer` chose `actual`: scores, closes and returns the open prediction; empty if none is."""
        guesses, self._open[layer] = self._open[layer], ()
        right, total = self._right[layer], self._total[layer]
        for rank, expert in enumerate(guesses):
            total[rank] += 1
            right[rank] += expert in actual
        return guesses

    def forget_open(self) -> None:
        """Drop all open predictions unscored: the generation that they belong to has ended or was cancelled."""
        self._open = [()] * len(self._open)

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Right guesses and all scored guesses, each int64 [layers, max_depth]."""
        return np.array(self._right, np.int64), np.array(self._total, np.int64)

    def accuracy(self) -> NDArray[np.float64]:
        """Share of right guesses, float64 [layers, max_depth] in 0..1, NaN where none was scored."""
        right, total = self.counts()
        accuracy = np.full(total.shape, np.nan)
        np.divide(right, total, out=accuracy, where=total > 0)
        return accuracy

    def check(self) -> None:
        """Raise AssertionError with both sides if the score or an open prediction contradicts itself."""
        for layer, (right, total, guesses) in enumerate(zip(self._right, self._total, self._open, strict=True)):
            for rank in range(self._max_depth):
                assert 0 <= right[rank] <= total[rank], f"({layer}, {rank}): {right[rank]} right of {total[rank]}"
            falling = sorted(total, reverse=True)
            assert total == falling, f"layer {layer}: a deeper rank was scored more often than one above it: {total}"
            distinct = len(set(guesses))
            assert distinct == len(guesses), f"layer {layer}: {len(guesses)} open guesses, {distinct} distinct experts"
