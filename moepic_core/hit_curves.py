"""What a cache of any size would have hit: exact, for all sizes in one pass over a routing trace.

`cost_model` and `synthetic` read ranks and curves, page and benchmarks compare them with what no policy can beat. The
engine's cache is a stack algorithm (Mattson et al., IBM Systems Journal 9(2), 1970): the order of eviction does not
depend on the size, so what C slots hold is part of what C + 1 slots hold, and one number per activation, its rank,
says which sizes hit. The place of an expert in the order alone does not: newcomers get in whatever their priority.
Decode tokens only, from an empty cache. Knows no bytes, seconds or splits.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .eviction import make_policy
from .routing import RoutingTrace

_EMPTY, _NEWCOMER, _PROTECTED = -1, 2**62, 2**63 - 1  # codes below and above those of cached experts


class Ranks(NamedTuple):
    """C slots hold an expert iff 0 <= its rank < C; -1 where the trace has no expert, num_experts for one never used.

    Taken at the instant when the token's experts become known, before they change the cache.
    """

    experts: NDArray[np.int16]  # [tokens, layers, k], of trace.experts
    guesses: NDArray[np.int16]  # [tokens, layers, depth], of trace.guesses


def ranks(policy_name: str, trace: RoutingTrace, seed: int = 0) -> Ranks:
    """Ranks of all activations and guesses of `trace`, exact for every size, by the engine's rules while it decodes.

    A token's experts are touched first, its hits are those of the cache before it, its newcomers always get in, in
    the router's order, and its own experts are never victims; with fewer slots than experts some newcomers stay out.
    `policy_name` is a policy of `eviction`, or "random": any victim is equally likely, drawn from `seed`.
    """
    num_experts = np.array(trace.num_experts, np.int16)[None, :, None]
    orders = _random_orders(trace, seed) if policy_name == "random" else _policy_orders(policy_name, trace)
    stacks = _Stacks(len(trace.num_experts), max(trace.num_experts))
    found = Ranks(np.empty(trace.experts.shape, np.int16), np.empty(trace.guesses.shape, np.int16))
    for token, (of_all, of_touched) in enumerate(orders):
        if of_all is not None:
            stacks.reorder(of_all)
        found.experts[token] = stacks.find(trace.experts[token])
        found.guesses[token] = stacks.find(trace.guesses[token])
        stacks.use(trace.experts[token], of_touched)
    return Ranks(
        np.where(trace.experts < 0, -1, np.minimum(found.experts, num_experts)),
        np.where(trace.guesses < 0, -1, np.minimum(found.guesses, num_experts)),
    )


class _Stacks:
    """The caches of all layers and all sizes: C slots of layer l hold the first C entries of row l.

    An entry is a code, (order << bits) | expert, the larger the longer it stays. So a comparison of codes is one of
    orders in which the lowest id leaves among equals.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._bits = num_experts.bit_length()
        self._mask = (1 << self._bits) - 1  # no expert has this id: _EMPTY & mask, and the place of -1 in an index
        self._lines = np.arange(num_layers)[:, None]
        self._places = np.broadcast_to(np.arange(num_experts), (num_layers, num_experts))
        self._row = np.full((num_layers, num_experts + 2), _EMPTY)  # who comes in, the stack, room for no expert
        self._stack = self._row[:, 1:]
        self._carry = np.empty_like(self._row)
        self._flat_carry, self._flat_stack = self._carry.reshape(-1)[:-1], self._row.reshape(-1)[1:]
        self._expert_to_place = np.full((num_layers, self._mask + 1), num_experts)

    def find(self, experts: NDArray[np.int16]) -> NDArray[np.int64]:
        """Places of `experts` [layers, any] in their stacks; the number of experts for one that is not there."""
        return self._expert_to_place[self._lines, experts]

    def reorder(self, orders: NDArray[np.int64]) -> None:
        """All experts get new orders [layers, experts], and stay where they are."""
        stack = self._stack[:, :-1]
        expert = np.minimum(stack & self._mask, orders.shape[1] - 1)
        stack[:] = np.where(stack == _EMPTY, _EMPTY, orders[self._lines, expert] << self._bits | expert)

    def use(self, experts: NDArray[np.int16], orders: NDArray[np.int64]) -> None:
        """The next token uses `experts` [layers, k], which have `orders` [layers, k] from now on.

        One pass for each of the k: the expert comes in from the left and pushes the least that it meets ahead of
        itself, place by place, into the gap that it left. At sizes which held it nothing moves beyond the gap; at the
        smaller ones what was pushed past the last slot is the victim. The token's others stand fast until their turn.
        """
        gaps, k = self.find(experts), experts.shape[1]
        incoming = np.where(experts < 0, _EMPTY, _NEWCOMER - np.arange(k))
        self._stack[self._lines, gaps] = _PROTECTED
        for column in range(k):
            self._stack[self._lines[:, 0], gaps[:, column]] = _EMPTY
            self._row[:, 0] = incoming[:, column]
            np.minimum.accumulate(self._row, axis=1, out=self._carry)
            # All rows in one run, which is four times as fast; what this leaves in their first column is never read.
            np.maximum(self._flat_carry, self._flat_stack, out=self._flat_stack)
        top = self._stack[:, :k]  # what came in stands here, as every size keeps as much of it as it has room for
        column = np.maximum(_NEWCOMER - top, 0)
        codes = orders << self._bits | experts
        top[:] = np.where(column < k, codes[self._lines, np.minimum(column, k - 1)], top)
        self._expert_to_place[self._lines, self._stack[:, :-1] & self._mask] = self._places
        self._expert_to_place[:, self._mask] = self._places.shape[1]


# Per token: new orders of all experts [layers, experts] if they change, and those of the token's experts [layers, k].
_Orders = Iterator[tuple[NDArray[np.int64] | None, NDArray[np.int64]]]


def _policy_orders(name: str, trace: RoutingTrace) -> _Orders:
    """Asks the very policies that the engine uses; what they answer is replaced by its place among all answers."""
    begins = np.flatnonzero(np.diff(trace.replies, prepend=-1)).tolist()
    token_to_request = {token: request for request, token in enumerate(begins)}
    of_all = np.full((len(begins), len(trace.num_experts), max(trace.num_experts)), -inf)
    of_touched = np.empty(trace.experts.shape)
    for layer, num_experts in enumerate(trace.num_experts):
        policy = make_policy(name, num_experts)
        answers: list[list[float]] = []
        for now, experts in enumerate(trace.experts[:, layer].tolist()):
            if now in token_to_request:
                policy.begin_request()
                of_all[token_to_request[now], layer, :num_experts] = [policy.priority(e, 0) for e in range(num_experts)]
            for expert in experts:
                if expert >= 0:
                    policy.touch(expert, now)
            answers.append([policy.priority(expert, 0) for expert in experts])
        of_touched[:, layer] = np.array(answers, float).reshape(of_touched[:, layer].shape)
    _, order = np.unique(np.concatenate((of_all.ravel(), of_touched.ravel())), return_inverse=True)
    all_orders, touched_orders = order[: of_all.size].reshape(of_all.shape), order[of_all.size :]
    for now, orders in enumerate(touched_orders.reshape(of_touched.shape)):
        yield (all_orders[token_to_request[now]] if now in token_to_request else None), orders


def _random_orders(trace: RoutingTrace, seed: int) -> _Orders:
    """All orders are drawn anew at every token, so nothing of an earlier draw tells who leaves."""
    generator = np.random.default_rng(seed)
    shape = len(trace.num_experts), max(trace.num_experts)
    for experts in trace.experts:
        yield generator.integers(0, 2**40, shape), np.zeros(experts.shape, np.int64)


def hit_curve(ranks: NDArray[np.int16], num_experts: int) -> NDArray[np.float64]:
    """Share of one layer's activations that hit, for 0 to num_experts slots: float64 [num_experts + 1].

    `ranks` [tokens, k] is one layer of `Ranks.experts`.
    """
    counts = np.bincount(ranks[ranks >= 0], minlength=num_experts + 1)
    curve: NDArray[np.float64] = np.concatenate(([0], counts[:-1].cumsum())) / max(1, counts.sum())
    return curve


def belady_hits(experts: NDArray[np.int16], num_slots: int | Sequence[int], num_experts: int) -> NDArray[np.bool_]:
    """Which activations of one layer hit if the victim is always the one used again last: bool [tokens, k].

    No choice of victims has more hits (Belady, IBM Systems Journal 5(2), 1966). As in the engine a token's experts
    all get in; of more experts than slots those stay that are used again soonest, an even better choice than it has.
    Of slots that change, one number per token, those that are left go to what is used again soonest.
    """
    capacities = [num_slots] * len(experts) if isinstance(num_slots, int) else num_slots
    expert_to_next_use = [len(experts)] * (num_experts + 1)  # the last one is for -1
    next_uses = []
    for token, row in reversed([*enumerate(experts.tolist())]):
        next_uses.append([expert_to_next_use[expert] for expert in row])
        for expert in row:
            expert_to_next_use[expert] = token
    cache: dict[int, int] = {}  # expert -> the token that uses it next
    hits = np.empty(experts.shape, np.bool_)
    for token, (row, capacity) in enumerate(zip(experts.tolist(), capacities, strict=True)):
        cache = _soonest(cache, cache, capacity)
        hits[token] = [expert in cache for expert in row]
        used = {expert: next_use for expert, next_use in zip(row, next_uses.pop(), strict=True) if expert >= 0}
        cache = _soonest(cache | used, used, capacity)
    return hits


def _soonest(cache: dict[int, int], first: Container[int], capacity: int) -> dict[int, int]:
    """The `capacity` experts of `cache` that are used again soonest, those of `first` before the others."""
    if len(cache) <= capacity:
        return cache
    others_last = sorted(cache, key=lambda expert: (expert not in first, cache[expert]))
    return {expert: cache[expert] for expert in others_last[:capacity]}
