"""The policy is chosen by what it would have hit on the routing at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_routing import toy_costs, toy_layer

from moepic_core.budgets import Needs
from moepic_core.eviction_choice import CANDIDATES, MARGIN, best_eviction, mean_hits
from moepic_core.hit_curves import hit_curve, ranks
from moepic_core.planner import make_plan
from moepic_core.routing import RoutingTrace
from moepic_core.spec import Plan, Settings

NUM_EXPERTS = 16


def routing(experts: np.ndarray, num_experts: int = NUM_EXPERTS) -> RoutingTrace:
    """Two layers that route alike."""
    experts = np.stack([experts, experts], axis=1).astype(np.int16)
    nothing = np.zeros(len(experts), np.int32), np.zeros(len(experts), np.int16)
    return RoutingTrace(experts, np.full_like(experts, -1), (num_experts,) * 2, *nothing, ("",), "made up")


def wandering(num_tokens: int = 800) -> RoutingTrace:
    """Every 40 tokens other four experts are in use, two of them by each token: only recency tells."""
    dice = np.random.default_rng(0)
    groups = [dice.permutation(NUM_EXPERTS)[:4] for _ in range(num_tokens // 40)]
    return routing(np.array([dice.permutation(groups[token // 40])[:2] for token in range(num_tokens)]))


def lasting(num_tokens: int = 800) -> RoutingTrace:
    """The same few experts are likely all the time, and chance brings others in between: only counts tell."""
    dice, likely = np.random.default_rng(0), 1 / np.arange(1, NUM_EXPERTS + 1) ** 1.2
    likely /= likely.sum()
    return routing(np.array([dice.choice(NUM_EXPERTS, 2, False, likely) for _ in range(num_tokens)]))


def test_recency_where_subjects_wander_and_counts_where_they_last() -> None:
    name, gain = best_eviction(wandering())
    assert (name, gain > 0.01) == ("lru", True)
    assert gain == pytest.approx(mean_hits("lru", wandering()) - mean_hits("lcp-aged", wandering()))
    assert best_eviction(lasting()) == ("lcp-aged", 0.0)


def test_the_mean_is_over_sizes_and_layers() -> None:
    trace = wandering(80)
    found = ranks("lru", trace).experts
    by_hand = [hit_curve(found[:, layer], NUM_EXPERTS)[size] for layer in range(2) for size in range(1, NUM_EXPERTS)]
    assert mean_hits("lru", trace) == pytest.approx(np.mean(by_hand))


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), min_size=1, max_size=40))
def test_the_choice_is_never_the_worse_one(tokens: list[list[int]]) -> None:
    trace = routing(np.array(tokens), 6)
    name, gain = best_eviction(trace)
    hits = {each: mean_hits(each, trace) for each in CANDIDATES}
    assert hits[name] >= max(hits.values()) - MARGIN
    assert gain == pytest.approx(hits[name] - hits[CANDIDATES[0]])


def test_layers_of_one_expert_and_missing_experts_are_no_problem() -> None:
    trace = routing(np.array([[0, -1]] * 5), 2)
    alone = replace(trace, num_experts=(1, 2), experts=trace.experts.copy())
    assert best_eviction(alone)[0] == "lcp-aged"


def test_a_plan_takes_the_better_one_unless_it_is_named() -> None:
    layer = toy_layer(num_experts=NUM_EXPERTS)
    needs, costs = Needs((layer, layer), 2, 0, 0, 0), toy_costs(layer, 2, 2, ratio=3)
    budget = (needs.smallest + needs.everything) // 2

    def plan(**settings: Any) -> Plan:
        return make_plan(Settings.create(checkpoint="toy", **settings), needs, budget, costs, wandering())

    assert plan().eviction == "lru" and "evicted by lru, which keeps" in plan().reason
    assert plan(eviction="lcp").eviction == "lcp" and "evicted by" not in plan(eviction="lcp").reason
    assert plan(strategy="moe-infinity").eviction == "request-frequency"
