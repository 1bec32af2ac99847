"""A routing trace as the cost model reads it: what tokens find cached and guessed, at every number of slots.

`cost_model.walk` and `split_search` read a `Workload`; it is made once for a trace, an eviction policy and a predictor
and serves every plan. Where guesses are unknown `guesses` completes them, and for a model that has not run yet uniform
routing is assumed. Knows no seconds and no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .activation_matrices import ActivationMatrices
from .guesses import Accuracies, completed
from .hit_curves import Ranks, ranks
from .routing import RoutingTrace
from .spec import EvictionName, PredictorName

WARM_UP = 0.25  # of a trace, whose tokens find caches that are still filling
SAMPLE = 12288  # tokens × layers of the rest that count; evenly spaced
ASSUMED_TOKENS = 512

Array = NDArray[np.float64]
Counts = NDArray[np.int16]


class Found(NamedTuple):
    """What tokens find when a layer's router has answered; arrays of one shape."""

    hits: Counts  # experts whose top is cached
    guessed_hits: Counts  # of those
    misses: Counts
    guessed_misses: Counts  # of those
    admitted: Counts | NDArray[np.int64]  # of those, which get a slot once they are computed
    wrong: Counts  # guesses of experts that the token does not use
    wrong_hits: Array | Counts  # of those, experts whose top is cached all the same
    skew: Array  # 0..1: how much earlier in its list a right guess stands than a wrong one


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What the sampled tokens find in one layer, with C slots in row C of 0..num_experts."""

    hits: Counts  # [num_experts + 1, tokens]
    guessed_hits: Counts  # [num_experts + 1, tokens], of those
    wrong_hits: Counts  # [num_experts + 1, tokens], wrong guesses whose expert is cached
    uses: Counts  # [tokens]
    right: Counts  # [tokens], guesses
    wrong: Counts  # [tokens], guesses
    skew: Array  # [tokens], see `Found`

    def found(self, slots: NDArray[np.int64]) -> Found:
        """With each of these numbers of slots: [plans, tokens]."""
        hits, guessed_hits = self.hits[slots], self.guessed_hits[slots]
        guessed_misses = self.right - guessed_hits
        # Hits keep their slots, and what was not guessed takes its own first.
        admitted = np.clip(slots[:, None] - self.uses + guessed_misses, 0, guessed_misses)
        return Found(
            hits,
            guessed_hits,
            self.uses - hits,
            guessed_misses,
            admitted,
            self.wrong,
            self.wrong_hits[slots],
            self.skew,
        )


@dataclass(frozen=True, eq=False)
class Workload:
    depth: int  # guesses per token and layer, at most
    layers: tuple[LayerTokens, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.layers[0].uses)

    def without_guesses(self) -> Workload:
        nothing, none = np.zeros_like, np.zeros(self.num_tokens, np.int16)
        return Workload(0, tuple(
            replace(layer, guessed_hits=nothing(layer.hits), wrong_hits=nothing(layer.hits), right=none, wrong=none)
            for layer in self.layers
        ))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Replay:
    """A trace, with the guesses that a predictor makes, and the ranks of its experts under an eviction policy."""

    trace: RoutingTrace
    ranks: Ranks
    guessing: str  # for people, how many guesses are right and how that is known; "" for none


def replay(trace: RoutingTrace, eviction: EvictionName, predictor: PredictorName, measured: Accuracies = ()) -> Replay:
    """One pass over `trace`, which has at least one token; `measured` is the accuracy of guesses where it has none."""
    guessing = ""
    if predictor == "activation-matrices":
        trace = replace(trace, guesses=_guesses_by_matrices(trace))
    elif predictor == "next-router":
        trace, guessing = completed(trace, measured)
    return Replay(trace, ranks(eviction, trace), guessing)


def assumed_trace(num_experts: Sequence[int], top_k: int) -> RoutingTrace:
    """Uniform routing without any guesses, for a model that has not run yet."""
    generator = np.random.default_rng(0)
    experts = np.stack([
        generator.random((ASSUMED_TOKENS, count)).argsort(axis=1)[:, :top_k] for count in num_experts
    ], axis=1).astype(np.int16)  # fmt: skip
    nothing = np.zeros(ASSUMED_TOKENS, np.int16)
    return RoutingTrace(
        experts, np.full_like(experts, -1), tuple(num_experts), nothing.astype(np.int32), nothing, ("",),
        "assumed: uniform routing",
    )  # fmt: skip


def workload(known: Replay, depth: int, most_slots: int | None = None, start: int | None = None) -> Workload:
    """The sampled tokens of a replay, with the first `depth` guesses of each list, for all numbers of slots or only
    those up to `most_slots`. Tokens before `start` do not count; None: the first WARM_UP of them.
    """
    trace, (expert_ranks, guess_ranks) = known.trace, known.ranks
    start = int(WARM_UP * trace.num_tokens) if start is None else start
    num_tokens = min(max(128, SAMPLE // len(trace.num_experts)), 384)
    tokens = np.unique(np.linspace(start, trace.num_tokens - 1, num_tokens).astype(int))
    experts, guesses = trace.experts[tokens], trace.guesses[tokens, :, :depth]
    used, made = experts >= 0, guesses >= 0
    same = (guesses[..., :, None] == experts[..., None, :]) & made[..., None]  # [tokens, layers, depth, k]
    right, guessed = same.any(axis=3), same.any(axis=2)
    wrong, skew = made & ~right, _skew(right, made)
    expert_ranks, guess_ranks = expert_ranks[tokens], guess_ranks[tokens, :, :depth]
    limits = [count if most_slots is None else min(count, most_slots) for count in trace.num_experts]
    layers = [
        LayerTokens(
            hits=_below(expert_ranks[:, layer], used[:, layer], limit),
            guessed_hits=_below(expert_ranks[:, layer], guessed[:, layer], limit),
            wrong_hits=_below(guess_ranks[:, layer], wrong[:, layer], limit),
            uses=used[:, layer].sum(axis=1, dtype=np.int16),
            right=right[:, layer].sum(axis=1, dtype=np.int16),
            wrong=wrong[:, layer].sum(axis=1, dtype=np.int16),
            skew=skew[:, layer],
        )
        for layer, limit in enumerate(limits)
    ]
    return Workload(min(depth, trace.guesses.shape[2]), tuple(layers))


def _below(rank: Counts, counted: NDArray[np.bool_], most: int) -> Counts:
    """How many of a token's ranks [tokens, any] are below C, for C from 0 to `most`: [most + 1, tokens]."""
    tokens = len(rank)
    place = (np.minimum(rank, most).astype(int) + 1) * tokens + np.arange(tokens)[:, None]
    counts = np.bincount(place[counted], minlength=(most + 2) * tokens).reshape(-1, tokens)
    return counts.cumsum(axis=0, dtype=np.int16)[: most + 1]


def _skew(right: NDArray[np.bool_], made: NDArray[np.bool_]) -> Array:
    """Of each token and layer, from the mean place of right guesses [tokens, layers, depth] in equally right lists.

    Places x in 0..1 with the density 1 + skew · (1 − 2x) have the mean 1/2 − skew/6 (ours).
    """
    place = (np.arange(right.shape[2]) + 0.5) / np.maximum(1, made.sum(axis=2, keepdims=True))
    num_right = right.sum(axis=2)
    total = np.bincount(num_right.ravel(), weights=(right * place).sum(axis=2).ravel())
    count = np.bincount(num_right.ravel(), weights=num_right.ravel())
    mean = np.divide(total, count, out=np.full_like(total, 0.5), where=count > 0)
    skew: Array = np.clip(3 - 6 * mean, 0, 1)[num_right]
    return skew


def _guesses_by_matrices(trace: RoutingTrace) -> Counts:
    """What activation matrices would have guessed; as many as the trace has experts per token."""
    matrices, depth = ActivationMatrices(trace.num_experts), trace.experts.shape[2]
    guesses = np.full_like(trace.experts, -1)
    num_layers, replies = len(trace.num_experts), trace.replies.tolist()
    for token, of_token in enumerate(trace.experts.tolist()):
        if token == 0 or replies[token] != replies[token - 1]:
            matrices.begin_request()
        for layer, experts in enumerate(of_token):
            matrices.observe(layer, [expert for expert in experts if expert >= 0])
            of, following = (token, layer + 1) if layer + 1 < num_layers else (token + 1, 0)
            if of < len(replies) and replies[of] == replies[token]:
                ranked = matrices.rank(following)[:depth]
                guesses[of, following, : len(ranked)] = ranked
    return guesses
