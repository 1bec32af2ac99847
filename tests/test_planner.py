"""Plans from measured costs: never worse than without a configurator, and what must not change them for the worse."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_routing import Toy

from moepic_core.cost_model import predict
from moepic_core.costs import Costs
from moepic_core.planner import Outlook, make_plan, what_if
from moepic_core.presets import costs_for, machine_named, model_named, needs_for
from moepic_core.spec import Plan, Settings
from moepic_core.uniform import uniform_plan

SETTINGS = Settings(checkpoint="x")
RESOLUTION = 0.05  # of a token's time: how far a plan may be beside the best one for its link (docs/RESULTS.md)
ALIKE = 2  # times faster: links that differ less are within the planner's resolution

toys = st.builds(Toy, st.integers(0, 10**6))
budget_shares = st.lists(st.floats(0, 1.1), min_size=2, max_size=12)


def budgets_of(toy: Toy, shares: list[float]) -> list[int]:
    """From the smallest budget on, rising."""
    needs = toy.needs
    return [needs.smallest + int(share * (needs.everything - needs.smallest)) for share in sorted(shares)]


def plans_for(toy: Toy, costs: Costs, budgets: list[int]) -> list[Plan]:
    return Outlook(SETTINGS, toy.needs, costs, toy.trace, max(budgets)).plans(budgets)


def seconds_of(plans: list[Plan]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([plan.predicted.total_s for plan in plans if plan.predicted is not None])


def copying(costs: Costs, part: float) -> Costs:
    """Newcomers are copied into their slots in this part of the time that they travel."""
    layers = [dataclasses.replace(layer, admit_s=part / costs.link_bytes_per_s) for layer in costs.layers]
    return dataclasses.replace(costs, layers=tuple(layers))


def faster(costs: Costs, times: float) -> Costs:
    return dataclasses.replace(costs, link_bytes_per_s=times * costs.link_bytes_per_s)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(toys, budget_shares, st.floats(0, 1))
def test_a_plan_is_never_predicted_slower_than_equal_shares_of_halves(
    toy: Toy, shares: list[float], part: float
) -> None:
    """Its prediction than the same number of slots in every layer, and itself than also with those left over."""
    costs, budgets = copying(toy.costs, part), budgets_of(toy, shares)
    for budget, plan in zip(budgets, plans_for(toy, costs, budgets), strict=True):
        halves = uniform_plan(SETTINGS.replace(split=0.5), toy.needs, budget)
        fewest = min(share.slots for share in halves.layers)
        same = dataclasses.replace(
            halves, layers=tuple(dataclasses.replace(share, slots=fewest) for share in halves.layers)
        )
        assert plan.predicted is not None
        own_s, halves_s, same_s = (predict(each, toy.layers, costs, toy.trace).total_s for each in (plan, halves, same))
        assert own_s <= min(plan.predicted.total_s, halves_s) + 1e-12
        assert plan.predicted.total_s <= same_s + 1e-12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(toys, st.lists(st.floats(0, 1.1), min_size=2, max_size=40))
def test_more_memory_never_predicts_slower(toy: Toy, shares: list[float]) -> None:
    seconds = seconds_of(plans_for(toy, toy.costs, budgets_of(toy, shares)))
    assert (np.diff(seconds) <= 1e-12).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(toys, budget_shares, st.floats(1, 30))
def test_a_slower_link_never_predicts_faster(toy: Toy, shares: list[float], times: float) -> None:
    """But by what the planner may be beside the best plan, where links are alike; a given plan never is."""
    budgets = budgets_of(toy, shares)
    slow, fast = (seconds_of(plans_for(toy, costs, budgets)) for costs in (toy.costs, faster(toy.costs, times)))
    assert (slow >= fast * (1 - (RESOLUTION if times < ALIKE else 1e-12))).all()


@settings(max_examples=25, deadline=None)
@given(toys, st.floats(0, 1.1), st.floats(0, 1))
def test_what_holds_for_every_plan(toy: Toy, share: float, part: float) -> None:
    """It keeps to its budget, says what it stands on and why it ends, and is the same when made again."""
    costs, (budget,) = copying(toy.costs, part), budgets_of(toy, [share])
    plan = make_plan(SETTINGS, toy.needs, budget, costs, toy.trace)
    assert plan.memory.used <= plan.memory.budget == budget
    assert plan.predicted is not None
    assert 1 <= plan.rounds <= 4
    ends = r"no expert is cached|experts are resident|planned in \d rounds: no (move|more)|equal shares, predicted"
    assert re.search(ends, plan.reason)
    assert (plan.prefetch_depth > 0) == (plan.predictor != "none")
    assert plan == make_plan(SETTINGS, toy.needs, budget, costs, toy.trace)


@pytest.mark.parametrize("strategy", ["moepic", "adapmoe", "mixtral-offloading", "on-demand"])
def test_the_curve_under_the_slider_is_that_of_single_plans(strategy: str) -> None:
    toy, wish = Toy(4), SETTINGS.replace(strategy=strategy)
    budgets = budgets_of(toy, [0.2, 0.5, 0.9])
    curve = what_if(wish, toy.needs, toy.costs, toy.trace, budgets)
    singles = [make_plan(wish, toy.needs, budget, toy.costs, toy.trace) for budget in budgets]
    assert curve == [(plan.memory.budget, plan.predicted) for plan in singles]


@pytest.mark.parametrize(("asked", "made"), [(0, 0), (1, 1), (3, 3), ("on", 3), ("off", 0)])
def test_asked_for_guesses_are_kept_to(asked: int | str, made: int) -> None:
    """Where the plan may choose, it is no slower than with all guesses, half of them or none."""
    toy = Toy(4)
    (budget,) = budgets_of(toy, [0.4])
    own, free = (
        make_plan(SETTINGS.replace(prefetch=wish), toy.needs, budget, toy.costs, toy.trace) for wish in (asked, "auto")
    )
    assert own.prefetch_depth == made
    assert own.predicted is not None and free.predicted is not None
    assert free.predicted.total_s <= own.predicted.total_s * (1 + 1e-9)


def test_half_of_the_guesses_may_be_best() -> None:
    toy = Toy(17)  # a slow link and few right guesses
    (budget,) = budgets_of(toy, [0.4])
    plans = [
        make_plan(SETTINGS.replace(prefetch=wish), toy.needs, budget, toy.costs, toy.trace)
        for wish in ("auto", "on", "off")
    ]
    free, *others = (plan.predicted.total_s for plan in plans if plan.predicted is not None)
    assert [plan.prefetch_depth for plan in plans] == [1, 3, 0]
    assert free < min(others)
    assert "at most 1 prefetched, as more would cost more than it hides" in plans[0].reason


def test_without_recorded_routing_whole_experts_are_preferred() -> None:
    """To equal splits, unless assumed routing says clearly otherwise; the reason says that it is assumed."""
    kinds = set()
    for seed in (1, 4, 12):
        toy = Toy(seed)
        budgets = budgets_of(toy, [0.3, 0.6, 0.9])
        wishes = [SETTINGS, SETTINGS.replace(split=1.0), SETTINGS.replace(split=0.5)]
        found = [Outlook(wish, toy.needs, toy.costs, None, max(budgets)).plans(budgets) for wish in wishes]
        for plan, whole, half in zip(*found, strict=True):
            assert plan.predicted is not None and whole.predicted is not None and half.predicted is not None
            assert plan.reason.endswith("assumed: uniform routing; 50% of guesses right (assumed)")
            kinds.add(plan.reason.split("(")[1].split(")")[0])
            assert plan.layers == whole.layers and plan.predicted == whole.predicted
            assert whole.predicted.total_s <= 1.1 * half.predicted.total_s + 1e-12
    assert kinds == {
        "whole experts are the fastest even if routing is uniform",
        "assumed routing cannot tell splits from whole experts, which real routing favours",
    }


def test_a_cache_of_nearly_everything_is_split_even_so() -> None:
    """Then a whole expert that is missing keeps a layer waiting, and a few rows of each do not."""
    model, machine = model_named("mixtral-8x7b"), machine_named("a6000")
    needs, costs = needs_for(model, machine, 4096), costs_for(model, machine)
    budget = needs.everything - sum(layer.layer_bytes for layer in needs.layers) // 20
    plan, whole = (make_plan(SETTINGS.replace(split=split), needs, budget, costs, None) for split in (None, 1.0))
    assert "(a split is clearly faster even if routing is uniform); assumed: uniform routing" in plan.reason
    assert {round(share.split_ratio, 2) for share in plan.layers} == {0.95}
    assert plan.predicted is not None and whole.predicted is not None
    assert plan.predicted.total_s < whole.predicted.total_s / 1.1
