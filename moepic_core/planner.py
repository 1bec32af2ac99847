"""From what the user wants, what the model needs and what was measured to a `Plan`. Pure: no torch, no clock, no file.

The engine, the command line and the page ask `make_plan`; `what_if` is the curve under the budget slider; an `Outlook`
serves both for any number of budgets. `uniform_plan` gives every layer the same split ratio and share of the cache: the
paper's system without its configurator (arXiv 2509.08342), and the answer while nothing is measured. The configurator
itself is `frontier`. A plan is the only way into the engine, and never takes more than its budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .cost_model import breakdown, table, walk
from .costs import Breakdown, Costs
from .errors import BadSettings, OutOfRoom
from .frontier import STEPS_PER_LAYER, Frontier, frontier
from .geometry import record_stride, top_rows
from .routing import RoutingTrace
from .shares import (
    DEFAULT_SPLIT,
    all_tops,
    cache_bytes,
    equal_shares,
    least_misses,
    roomiest_split,
    shares_of,
    spend_rest,
)
from .spec import STRATEGIES, EvictionName, LayerPlan, MemoryPlan, MoeLayer, Plan, PredictorName, Settings
from .units import format_bytes, parse_bytes
from .workload import Workload, assumed_trace, replay, workload

HEADROOM = 0.9  # part of the free memory that budgets may take: a device filled to the brim slows down or fails
EQUAL_SPLITS = (0.5, 1.0)  # that every plan is compared with
MOST_TOKENS, FEWEST_TOKENS = 5000, 1024  # of a trace that is planned from: the newest (5,000: arXiv 2509.08342)
EXPERTS_REPLAYED = 2_500_000  # tokens × experts, between the two: a fraction of a second's work
OF_EXPERTS = "of experts"  # after a percentage: of the experts' bytes
SMALLEST_STAGING = 2  # records: one is computed with while the next arrives


@dataclass(frozen=True)
class Needs:
    """Device bytes that a model takes before any expert is cached."""

    layers: tuple[MoeLayer, ...]
    top_k: int
    resident: int
    kv: int
    workspace: int

    @property
    def record(self) -> int:
        """Bytes of one staging buffer."""
        return max(record_stride(layer) for layer in self.layers)

    @property
    def fixed(self) -> int:
        return self.resident + self.kv + self.workspace

    @property
    def smallest(self) -> int:
        """The least budget with which anything runs: no expert cached, two staging buffers."""
        return self.fixed + SMALLEST_STAGING * self.record

    @property
    def everything(self) -> int:
        """The budget with which all experts are resident: 100 %."""
        return self.fixed + self.staging_records * self.record + all_tops(self.layers, 1.0)

    @property
    def staging_records(self) -> int:
        """Room for the experts that two layers use for one token."""
        return max(SMALLEST_STAGING, 2 * self.top_k)


def budget_bytes(vram: str | int, needs: Needs, free_bytes: int) -> int:
    """The budget in bytes. `auto`: what is free, but not more than everything. `50%`: of what everything needs.
    `50% of experts`: what all but the cache needs, and half of the experts.

    Raises OutOfRoom below the smallest possible budget, and names it.
    """
    if isinstance(vram, str) and vram.strip().lower() == "auto":
        budget = min(free_bytes, needs.everything)
    elif isinstance(vram, str) and vram.strip().endswith("%"):
        budget = int(_percent(vram) * needs.everything)
    elif isinstance(vram, str) and vram.strip().endswith(OF_EXPERTS):
        cache = _percent(vram.strip().removesuffix(OF_EXPERTS)) * sum(layer.layer_bytes for layer in needs.layers)
        budget = needs.everything - all_tops(needs.layers, 1.0) + int(cache)
    else:
        budget = parse_bytes(vram)
    if budget < needs.smallest:
        raise OutOfRoom(
            f"a budget of {format_bytes(budget)} is too small for this model: the smallest is "
            f"{format_bytes(needs.smallest)} ({needs.smallest} bytes: weights outside the experts "
            f"{format_bytes(needs.resident)}, KV {format_bytes(needs.kv)}, workspace {format_bytes(needs.workspace)}, "
            f"staging {format_bytes(SMALLEST_STAGING * needs.record)}); raise the budget or shorten the context"
        )
    return budget


def uniform_plan(settings: Settings, needs: Needs, budget: int) -> Plan:
    """The same split ratio and share of the cache for every layer, under `budget` bytes.

    Staging gets its full size before the cache gets anything, since without it nothing overlaps.
    """
    strategy = STRATEGIES[settings.strategy]
    staging = min(needs.staging_records, (budget - needs.fixed) // needs.record)
    assert staging >= SMALLEST_STAGING, (staging, budget, needs)
    room = _room(settings, needs, budget)
    wanted = settings.split if settings.split is not None else strategy.split
    split = roomiest_split(needs.layers, room) if wanted is None else wanted
    shares = equal_shares(needs.layers, split, room)
    grown = "the paper's best uniform ratio" if split == DEFAULT_SPLIT else "all tops fit, so tops grew"
    why = "as the strategy or the settings say" if wanted is not None else grown
    predictor = _predictor(settings)
    return Plan(
        layers=shares,
        staging_records=staging,
        eviction=_eviction(settings),
        predictor=predictor,
        prefetch_depth=min(needs.top_k, staging - 1) if predictor != "none" else 0,
        misses=strategy.misses,
        memory=MemoryPlan(
            needs.resident, needs.kv, needs.workspace, staging * needs.record, cache_bytes(needs.layers, shares), budget
        ),
        strategy=strategy.name,
        reason=_reason(strategy.name, shares, needs.layers, why, split),
    )


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
        self._allocation = "uniform" if self._cold else STRATEGIES[settings.strategy].allocation
        if trace is None or trace.num_tokens == 0:
            trace = assumed_trace(num_experts, needs.top_k)
        trace = trace.last(min(MOST_TOKENS, max(FEWEST_TOKENS, EXPERTS_REPLAYED // sum(num_experts))))
        self._replay = replay(trace, _eviction(settings), _predictor(settings))
        depth = needs.top_k if _predictor(settings) != "none" else 0
        self._depths = [depth, 0] if depth and self._may_choose else [depth]
        self._works = {each: workload(self._replay, each) for each in self._depths}

    def plan(self, budget: int) -> Plan:
        return self.plans([budget])[0]

    def plans(self, budgets: Sequence[int]) -> list[Plan]:
        """One for each budget; together they take little longer than one."""
        layers, bases = self.needs.layers, [uniform_plan(self.settings, self.needs, budget) for budget in budgets]
        candidates = [self._candidates(base) for base in bases]
        everything = table(*(shares for each in candidates for shares in each))
        depths = {base.prefetch_depth for base in bases} | ({0} if self._may_choose else set())
        walks = {
            depth: walk(self._work(depth), layers, self.costs, *everything, itemised=True) for depth in sorted(depths)
        }
        plans, row = [], 0
        for base, shares in zip(bases, candidates, strict=True):
            ways = [base.prefetch_depth, 0] if self._may_choose else [base.prefetch_depth]
            seconds = np.array([walks[depth].total_s[row : row + len(shares)] for depth in ways])
            way, best = np.unravel_index(seconds.argmin(), seconds.shape)
            safe = seconds[:, : self._num_safe].copy()
            if len(ways) > 1:  # a larger budget knows what was found for one way to prefetch under that way only
                *_, own_way = self._frontier.best(self._room(base))
                safe[1 - own_way, 0] = np.inf
            of_way, of_shares = np.unravel_index(safe.argmin(), safe.shape)
            predicted = breakdown(walks[ways[of_way]], row + int(of_shares), self.costs)
            plans.append(self._chosen(base, shares, int(best), ways[way], float(seconds.min()), predicted))
            row += len(shares)
        return plans

    def _candidates(self, base: Plan) -> list[tuple[LayerPlan, ...]]:
        """What the allocation proposes, and for the configurator the equal shares that it has to beat; then the same
        with what is left over, which helps, but not always more when more is left.
        """
        layers, room = self.needs.layers, self._room(base)
        if self._allocation == "dynamic-program":
            return [least_misses(layers, [share.top_rows for share in base.layers], self._hits, room)]
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
        seconds: float,
        predicted: Breakdown,
    ) -> Plan:
        layers, shares, reason, rounds = self.needs.layers, candidates[best], base.reason, 0
        if self._allocation == "dynamic-program":
            why = "shares of the fewest expected misses, by dynamic program"
            reason = _reason(base.strategy, shares, layers, why)
        elif self._allocation == "planned":
            levels, *_ = self._frontier.best(self._room(base))
            rounds, why = levels.rounds, "equal shares, predicted to be faster than all unequal ones that were found"
            if best % self._num_safe == 0:
                end = "no move of memory between layers helps any more" if levels.settled else "no more are made"
                why = f"planned in {rounds} rounds: {end}"
            if self._may_choose and predicted.total_s > self._streaming_s:
                guesses, empty, without = min(self._empty[: base.prefetch_depth + 1], key=lambda way: way[2].total_s)
                predicted = min(predicted, without, key=lambda each: each.total_s)
                if without.total_s < seconds:
                    depth, shares = guesses, empty
            why += "; no prefetch, which would cost more than it hides" if depth < base.prefetch_depth else ""
            reason = _reason(base.strategy, shares, layers, why)
        notes = [self._replay.trace.source] if self._cold else []
        notes += [self._replay.assumed] if self._replay.assumed and depth else []
        return replace(
            base,
            layers=shares,
            predictor=base.predictor if depth else "none",
            prefetch_depth=depth,
            memory=replace(base.memory, cache=cache_bytes(layers, shares)),
            reason="; ".join([reason, *notes]),
            rounds=rounds,
            predicted=predicted,
        )

    def _room(self, base: Plan) -> int:
        return max(0, _room(self.settings, self.needs, base.memory.budget))

    @property
    def _num_safe(self) -> int:
        """Candidates, the first ones, of which a larger budget has better ones or the same: what is predicted."""
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
        works, room = [self._works[depth] for depth in self._depths], _room(settings, needs, self.largest)
        return frontier(works, needs.layers, self.costs, max(0, room), rows, self.steps_per_layer)


def _room(settings: Settings, needs: Needs, budget: int) -> int:
    """Bytes for the cache; negative where staging is not complete."""
    if STRATEGIES[settings.strategy].allocation == "none":
        return 0
    return budget - needs.fixed - needs.staging_records * needs.record


def _eviction(settings: Settings) -> EvictionName:
    return STRATEGIES[settings.strategy].eviction if settings.eviction == "auto" else settings.eviction


def _predictor(settings: Settings) -> PredictorName:
    own = STRATEGIES[settings.strategy].predictor
    if settings.prefetch == "auto":
        return own
    if settings.prefetch == "off":
        return "none"
    return own if own != "none" else "next-router"


def _percent(text: str) -> float:
    number = text.strip()[:-1].strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise BadSettings(f"budget {text!r} is not understood; a percentage is above 0 and at most 100, such as 50%")
    return value / 100


def _reason(
    name: str, shares: Sequence[LayerPlan], layers: Sequence[MoeLayer], why: str, asked: float | None = None
) -> str:
    slots, experts = sum(share.slots for share in shares), sum(layer.num_experts for layer in layers)
    splits = [share.split_ratio for share in shares] if asked is None else [asked]
    if not slots:
        return f"{name}: no expert is cached, every use streams from the host"
    if slots == experts and min(splits) >= 1:
        return f"{name}: all {experts} experts are resident"
    span = f"{splits[0]:.2f} everywhere" if min(splits) == max(splits) else f"{min(splits):.2f} to {max(splits):.2f}"
    return f"{name}: {slots} of {experts} tops cached, split ratio {span} ({why})"
