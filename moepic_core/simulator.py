"""Replay of a recorded or made-up routing trace under any plan on any machine: what the engine would do, and when.

Command line, benchmarks and figures call `simulate`. Who is cached, staged, evicted, guessed and admitted, and in which
order segments are computed, follows `residency` step by step and asks the same policies and predictors; so hits,
partial hits, misses and bytes are the engine's. Times come from `Costs` alone: computation is one server, the link
(`simulated_link`) another. Decode tokens only; prompts between replies are left out. The same input gives the same
figures everywhere. One core runs 7,000 (top 8, prefetched) to 40,000 layer steps (top 2) per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .costs import Breakdown, Costs
from .guesses import completed
from .routing import RoutingTrace
from .simulated_residency import SimulatedResidency
from .simulated_step import run_token
from .spec import MoeLayer, Plan
from .trace import EVENT, Outcome


@dataclass(frozen=True, eq=False)
class Simulation:
    """What the counted tokens did; the names are those of `metrics.METRICS`."""

    token_s: NDArray[np.float64]  # [tokens], from the start of a token to the start of the next
    breakdown: Breakdown  # of the mean token; its total is the mean of `token_s`
    outcomes: NDArray[np.int64]  # [layers, 3], uses of experts in the columns of `Outcome`
    stall_s: NDArray[np.float64]  # [layers]
    demand_bytes: int
    prefetch_bytes: int
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    accuracy: NDArray[np.float64]  # [layers, depth], share of right guesses by rank, warm-up included; NaN: none made
    events: NDArray[np.void]  # [rows] of EVENT, in the order of the tokens; empty unless asked for
    source: str  # for people, to be shown beside every figure

    @property
    def tpot_s(self) -> float:
        return self.breakdown.total_s


def simulate(
    trace: RoutingTrace,
    plan: Plan,
    costs: Costs,
    layers: Sequence[MoeLayer],
    *,
    warm_up: int = 0,
    earlier: RoutingTrace | None = None,
    with_events: bool = False,
) -> Simulation:
    """Replays all tokens of `trace`; figures are those of the tokens after the first `warm_up`.

    Caches are empty at first or, given what `earlier` tokens used, filled as the engine fills them when it starts. An
    event of a transfer covers consecutive chunks, where the engine records one for each. Guesses that the trace lacks
    are completed as for planning (`guesses`). Raises AssertionError when trace, plan, costs and layers are not of one
    model, or when no token is left to count.
    """
    shape = (len(layers), [layer.num_experts for layer in layers])
    assert shape == (trace.experts.shape[1], list(trace.num_experts)), (shape, trace.num_experts)
    assert len(plan.layers) == len(costs.layers) == len(layers), (len(plan.layers), len(costs.layers), len(layers))
    assert 0 <= warm_up < trace.num_tokens, f"{warm_up} tokens of warm-up, {trace.num_tokens} tokens in the trace"
    residency = SimulatedResidency(plan, costs, layers, with_events)
    if earlier is not None:
        residency.remember(earlier)
    if plan.predictor == "next-router":
        trace, _ = completed(trace, costs.guess_accuracy)
    experts, guesses, replies = trace.experts.tolist(), trace.guesses.tolist(), trace.replies.tolist()
    starts_s = []
    for token, reply in enumerate(replies):
        if token == warm_up:
            residency.count_from_here()
        starts_s.append(residency.now_s)
        if token == 0 or reply != replies[token - 1]:
            residency.begin_reply(reply)
        goes_on = token + 1 < len(replies) and replies[token + 1] == reply
        run_token(residency, experts[token], [*guesses[token][1:], guesses[token + 1][0] if goes_on else []])
        if not goes_on:
            residency.forget_guesses()
    residency.check()
    token_s = np.diff([*starts_s[warm_up:], residency.now_s])
    return _figures(residency, costs, token_s, f"simulated, costs {costs.source}, trace {trace.source}")


def _figures(residency: SimulatedResidency, costs: Costs, token_s: NDArray[np.float64], source: str) -> Simulation:
    link, num_tokens = residency.link, len(token_s)
    outcomes = np.array([layer.outcomes for layer in residency.layers])
    shares = outcomes.sum(axis=0) / outcomes.sum()
    stall_s = np.array([layer.stall_s for layer in residency.layers])
    before_s = sum(layer.before_s for layer in costs.layers)
    stall_of_token_s = float(stall_s.sum()) / num_tokens
    link_bytes = link.demand_bytes + link.prefetch_bytes
    breakdown = Breakdown(
        before_s=before_s,
        experts_s=float(token_s.mean()) - before_s - stall_of_token_s - costs.after_s,
        stall_s=stall_of_token_s,
        after_s=costs.after_s,
        link_s=link.busy_s / num_tokens,
        hit_rate=float(shares[Outcome.HIT]),
        partial_hit_rate=float(shares[Outcome.PARTIAL]),
        miss_rate=float(shares[Outcome.MISS]),
        link_bytes=link_bytes / num_tokens,
        wasted_s=link.busy_s / num_tokens * residency.wasted_bytes / max(1, link_bytes),
    )
    return Simulation(
        token_s, breakdown, outcomes, stall_s, link.demand_bytes, link.prefetch_bytes, residency.used_bytes,
        residency.wasted_bytes, residency.predictor.accuracy(), np.array(residency.rows, EVENT), source,
    )  # fmt: skip
