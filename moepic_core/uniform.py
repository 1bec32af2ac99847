"""The plan that needs no measurement: the same split ratio and share of the cache for every layer.

The paper's system without its configurator (arXiv 2509.08342), and the answer while nothing is measured. `planner`
starts from it and takes over what holds for every plan: staging, eviction, predictor, number of guesses. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from .budgets import SMALLEST_STAGING, Needs
from .shares import DEFAULT_SPLIT, cache_bytes, equal_shares, roomiest_split
from .spec import STRATEGIES, EvictionName, LayerPlan, MemoryPlan, MoeLayer, Plan, PredictorName, Settings


def uniform_plan(settings: Settings, needs: Needs, budget: int) -> Plan:
    """The same split ratio and share of the cache for every layer, under `budget` bytes."""
    strategy = STRATEGIES[settings.strategy]
    staging = min(needs.staging_records, (budget - needs.fixed) // needs.record)
    assert staging >= SMALLEST_STAGING, (staging, budget, needs)
    room = cache_room(settings, needs, budget)
    wanted = settings.split if settings.split is not None else strategy.split
    split = roomiest_split(needs.layers, room) if wanted is None else wanted
    shares = equal_shares(needs.layers, split, room)
    grown = "the paper's best uniform ratio" if split == DEFAULT_SPLIT else "all tops fit, so tops grew"
    why = "as the strategy or the settings say" if wanted is not None else grown
    predictor = predictor_of(settings)
    return Plan(
        layers=shares,
        staging_records=staging,
        eviction=eviction_of(settings),
        predictor=predictor,
        prefetch_depth=min(settings.most_guesses(needs.top_k), staging - 1) if predictor != "none" else 0,
        misses=strategy.misses,
        memory=MemoryPlan(
            needs.resident, needs.kv, needs.workspace, staging * needs.record, cache_bytes(needs.layers, shares), budget
        ),
        strategy=strategy.name,
        reason=reason_of(strategy.name, shares, needs.layers, why, split),
    )


def cache_room(settings: Settings, needs: Needs, budget: int) -> int:
    """Bytes that `budget` leaves for the cache; staging comes first, since without it nothing overlaps."""
    if STRATEGIES[settings.strategy].allocation == "none":
        return 0
    return max(0, budget - needs.fixed - needs.staging_records * needs.record)


def eviction_of(settings: Settings) -> EvictionName:
    return STRATEGIES[settings.strategy].eviction if settings.eviction == "auto" else settings.eviction


def predictor_of(settings: Settings) -> PredictorName:
    own = STRATEGIES[settings.strategy].predictor
    if settings.prefetch == "auto":
        return own
    if settings.prefetch in ("off", 0):
        return "none"
    return own if own != "none" else "next-router"


def reason_of(
    name: str, shares: Sequence[LayerPlan], layers: Sequence[MoeLayer], why: str, asked: float | None = None
) -> str:
    slots, experts = sum(share.slots for share in shares), sum(layer.num_experts for layer in layers)
    splits = [share.split_ratio for share in shares] if asked is None else [asked]
    if not slots:
        return f"{name}: no expert is cached, every use streams from the host"
    if slots == experts and min(splits) >= 1:
        return f"{name}: all {experts} experts are resident"
    span = f"{splits[0]:.2f} everywhere" if min(splits) == max(splits) else f"{min(splits):.2f} to {max(splits):.2f}"
    return f"{name}: slots for {slots} of {experts} tops, split ratio {span} ({why})"
