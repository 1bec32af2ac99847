"""From what the user wants, what the model needs and what was measured to a `Plan`. Pure: no torch, no clock, no file.

The engine, the command line and the page ask `make_plan`; `what_if` is the curve under the budget slider; an `Outlook`
serves both for any number of budgets. The configurator itself is `frontier`. A plan is the only way into the engine,
and never takes more than its budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .budgets import Needs
from .cost_model import breakdown, table, walk
from .costs import Breakdown, Costs
from .eviction_choice import best_eviction
from .frontier import STEPS_PER_LAYER, Frontier, frontier
from .geometry import record_stride, top_rows
from .routing import RoutingTrace
from .shares import cache_bytes, equal_shares, least_misses, shares_of, spend_rest
from .spec import STRATEGIES, LayerPlan, Plan, Settings
from .uniform import cache_room, eviction_of, predictor_of, reason_of, uniform_plan
from .workload import Workload, assumed_trace, replay, workload

EQUAL_SPLITS = (0.5, 1.0)  # that every plan is compared with
MOST_TOKENS, FEWEST_TOKENS = 5000, 256  # of a trace that is planned from: the newest (5,000: arXiv 2509.08342)
TELLING = 1.1  # times faster that assumed routing must say a split is before it is chosen over whole experts
HALVED = 8192  # experts in all layers, up to which half of the guesses are tried too: it is half as much work again
EXPERTS_REPLAYED = 4_200_000  # tokens × experts, between the two: what that loses is in docs/RESULTS.md


def make_plan(settings: Settings, needs: Needs, budget: int, costs: Costs | None, trace: RoutingTrace | None) -> Plan:
    """The plan of a strategy under `budget` bytes, as its allocation says; equal shares while too little is known."""
    if costs is None:
        plan = uniform_plan(settings, needs, budget)
        waits = STRATEGIES[settings.strategy].allocation in ("planned", "dynamic-program")
        return replace(plan, reason=f"{plan.reason}; nothing is measured yet to plan from") if waits else plan
    return Outlook(settings, needs, costs, trace, budget).plan(budget)


def what_if(
    settings: Settings, needs: Needs, costs: Costs, trace: RoutingTrace | None, budgets: Sequence[int]
) -> list[tuple[int, Breakdown]]:
    """What a token would cost under each budget: the curve under the slider."""
    plans = Outlook(settings, needs, costs, trace, max(budgets)).plans(budgets) if budgets else []
    return [(plan.memory.budget, plan.predicted) for plan in plans if plan.predicted is not None]


class Outlook:
    """Plans and predictions for any budget up to `largest`, from one pass over a trace. Keep it while trace, costs and
    settings are the same: what budgets have in common is made once, when it is first needed.

    A prediction of the configurator never rises with the budget. It leaves out what is too little for another level or
    another slot in every layer, so its plan may be faster.
    """

    def __init__(
        self,
        settings: Settings,
        needs: Needs,
        costs: Costs,
        trace: RoutingTrace | None,
        largest: int,
        steps_per_layer: int = STEPS_PER_LAYER,
    ) -> None:
        assert len(costs.layers) == len(needs.layers), (len(costs.layers), len(needs.layers))
        self.settings = settings
        self.needs = needs
        self.costs = costs
        self.largest = largest
        self.steps_per_layer = steps_per_layer
        num_experts = [layer.num_experts for layer in needs.layers]
        self._cold = trace is None or trace.num_tokens == 0
        allocation = STRATEGIES[settings.strategy].allocation
        self._allocation: str = "uniform" if self._cold and allocation != "none" else allocation
        if self._cold and allocation == "planned" and settings.split is None:
            self._allocation = "assumed"
        if trace is None or trace.num_tokens == 0:
            trace = assumed_trace(num_experts, needs.top_k)
        trace = trace.last(min(MOST_TOKENS, max(FEWEST_TOKENS, EXPERTS_REPLAYED // sum(num_experts))))
        self._eviction, self._more_hits = eviction_of(settings), 0.0
        if self._allocation == "planned" and settings.eviction == "auto":
            self._eviction, self._more_hits = best_eviction(trace)
        self._replay = replay(trace, self._eviction, predictor_of(settings), costs.guess_accuracy)
        depth = settings.most_guesses(needs.top_k) if predictor_of(settings) != "none" else 0
        half = depth // 2 if sum(num_experts) <= HALVED else 0
        self._depths = list(dict.fromkeys((depth, half, 0))) if self._may_choose else [depth]
        self._works = {each: workload(self._replay, each) for each in self._depths}

    def plan(self, budget: int) -> Plan:
        return self.plans([budget])[0]

    def plans(self, budgets: Sequence[int]) -> list[Plan]:
        """One for each budget; together they take little longer than one."""
        layers, bases = self.needs.layers, [uniform_plan(self.settings, self.needs, budget) for budget in budgets]
        bases = [replace(base, eviction=self._eviction) for base in bases]
        candidates = [self._candidates(base) for base in bases]
        everything = table(*(shares for each in candidates for shares in each))
        ways_of = [[min(depth, base.prefetch_depth) for depth in self._depths] for base in bases]
        walks = {
            depth: walk(self._work(depth), layers, self.costs, *everything, itemised=True)
            for depth in sorted({depth for ways in ways_of for depth in ways})
        }
        plans, row = [], 0
        for base, shares, ways in zip(bases, candidates, ways_of, strict=True):
            seconds = np.array([walks[depth].total_s[row : row + len(shares)] for depth in ways])
            # Uniform routing is the hardest there is for whole experts, so a split has to be clearly faster with it.
            weighed = seconds * ([1.0, TELLING, TELLING] if self._allocation == "assumed" else 1.0)
            way, best = np.unravel_index(weighed.argmin(), seconds.shape)
            safe = weighed[:, : self._num_safe].copy()
            if len(ways) > 1:  # a larger budget knows what was found for one way to prefetch under that way only
                *_, own_way = self._frontier.best(self._room(base))
                safe[np.arange(len(ways)) != own_way, 0] = np.inf
            of_way, of_shares = np.unravel_index(safe.argmin(), safe.shape)
            predicted = breakdown(walks[ways[of_way]], row + int(of_shares), self.costs)
            plans.append(self._chosen(base, shares, int(best), ways[way], seconds, predicted))
            row += len(shares)
        return plans

    def _candidates(self, base: Plan) -> list[tuple[LayerPlan, ...]]:
        """What the allocation proposes, and for the configurator the equal shares that it has to beat; then the same
        with what is left over, which helps, but not always more when more is left.
        """
        layers, room = self.needs.layers, self._room(base)
        if self._allocation == "dynamic-program":
            return [least_misses(layers, [share.top_rows for share in base.layers], self._hits, room)]
        if self._allocation == "assumed":
            return [equal_shares(layers, 1.0, room), equal_shares(layers, 0.5, room), base.layers]
        if self._allocation != "planned":
            return [base.layers]
        levels, row, _ = self._frontier.best(room)
        found = shares_of(layers, levels.slots[row].tolist(), levels.rows[row].tolist())
        splits = EQUAL_SPLITS if self.settings.split is None else [self.settings.split]
        safe = [found, *(equal_shares(layers, split, room, complete=True) for split in splits)]
        spent = spend_rest(layers, found, self._hits, room)
        return [*safe, spent, *(equal_shares(layers, split, room) for split in splits)]

    def _chosen(
        self,
        base: Plan,
        candidates: Sequence[tuple[LayerPlan, ...]],
        best: int,
        depth: int,
        seconds: NDArray[np.float64],
        predicted: Breakdown,
    ) -> Plan:
        """The plan of the best candidate, or without any cache where even that is faster."""
        layers, shares, why, rounds = self.needs.layers, candidates[best], self._why(base, best, seconds), 0
        if self._allocation == "planned":
            rounds = self._frontier.best(self._room(base))[0].rounds
        if self._may_choose and predicted.total_s > self._streaming_s:
            guesses, empty, without = min(self._empty[: base.prefetch_depth + 1], key=lambda way: way[2].total_s)
            predicted = min(predicted, without, key=lambda each: each.total_s)
            if without.total_s < seconds.min():
                depth, shares = guesses, empty
        if depth < base.prefetch_depth:
            fewer = f"at most {depth} prefetched, as more" if depth else "no prefetch, which"
            why += f"; {fewer} would cost more than it hides"
        reason = reason_of(base.strategy, shares, layers, why) if why else base.reason
        return replace(
            base,
            layers=shares,
            predictor=base.predictor if depth else "none",
            prefetch_depth=depth,
            memory=replace(base.memory, cache=cache_bytes(layers, shares)),
            reason="; ".join([reason, *self._notes(base, shares, depth)]),
            rounds=rounds,
            predicted=predicted,
        )

    def _why(self, base: Plan, best: int, seconds: NDArray[np.float64]) -> str:
        """What speaks for candidate `best`, for people; "" where no other was asked."""
        if self._allocation == "dynamic-program":
            return "shares of the fewest expected misses, by dynamic program"
        if self._allocation == "assumed":
            whole_s, *split_s = seconds[0]
            if best > 0:
                return "a split is clearly faster even if routing is uniform"
            if whole_s > min(split_s) / TELLING:
                return "assumed routing cannot tell splits from whole experts, which real routing favours"
            return "whole experts are the fastest even if routing is uniform"
        if self._allocation != "planned":
            return ""
        if best % self._num_safe > 0:
            return "equal shares, predicted to be faster than all unequal ones that were found"
        levels, *_ = self._frontier.best(self._room(base))
        end = "no move of memory between layers helps any more" if levels.settled else "no more are made"
        return f"planned in {levels.rounds} rounds: {end}"

    def _notes(self, base: Plan, shares: Sequence[LayerPlan], depth: int) -> list[str]:
        """What a plan stands on, for people."""
        notes = [self._replay.trace.source] if self._cold else []
        if self._more_hits and any(share.slots for share in shares):
            more, other = f"{self._more_hits:.1%} more of what is used", eviction_of(self.settings)
            notes.append(f"evicted by {base.eviction}, which keeps {more} than {other}")
        notes += [self._replay.guessing] if self._replay.guessing and depth else []
        return notes + ([self.costs.note] if self.costs.note else [])

    def _room(self, base: Plan) -> int:
        return cache_room(self.settings, self.needs, base.memory.budget)

    @property
    def _num_safe(self) -> int:
        """Candidates, the first ones, of which a larger budget has better ones or the same: what is predicted."""
        if self._allocation == "assumed":
            return 3
        if self._allocation != "planned":
            return 1
        return 2 if self.settings.split is not None else 1 + len(EQUAL_SPLITS)

    @property
    def _may_choose(self) -> bool:
        """Whether the plan says how many guesses are made."""
        return self._allocation == "planned" and self.settings.prefetch == "auto"

    @cached_property
    def _empty(self) -> list[tuple[int, tuple[LayerPlan, ...], Breakdown]]:
        """For each number of guesses the best way without any cache: experts travel in one piece or in two."""
        layers, found = self.needs.layers, []
        ways = [equal_shares(layers, split, room=0) for split in EQUAL_SPLITS]
        for depth in range(self.needs.top_k + 1):
            work = workload(self._replay, depth, most_slots=0)
            walked = walk(work, layers, self.costs, *table(*ways), itemised=True)
            best = int(walked.total_s.argmin())
            found.append((depth, ways[best], breakdown(walked, best, self.costs)))
        return found

    @cached_property
    def _streaming_s(self) -> float:
        """For which the link is busy at least when all that a token uses travels: none is faster without a cache."""
        uses = [tokens.uses.mean() for tokens in self._works[self._depths[0]].layers]
        sizes = [record_stride(layer) for layer in self.needs.layers]
        return float(np.dot(uses, sizes)) / self.costs.link_bytes_per_s

    @cached_property
    def _hits(self) -> list[NDArray[np.float64]]:
        """Of a token, per layer with 0 to num_experts slots."""
        return [tokens.hits.mean(axis=1) for tokens in self._works[self._depths[0]].layers]

    def _work(self, depth: int) -> Workload:
        if depth not in self._works:
            self._works[depth] = workload(self._replay, depth)
        return self._works[depth]

    @cached_property
    def _frontier(self) -> Frontier:
        settings, needs = self.settings, self.needs
        rows = None if settings.split is None else [top_rows(layer, settings.split) for layer in needs.layers]
        works, room = [self._works[depth] for depth in self._depths], cache_room(settings, needs, self.largest)
        return frontier(works, needs.layers, self.costs, room, rows, self.steps_per_layer)
