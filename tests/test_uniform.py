"""The uniform plan in exact numbers, and what holds for every model, budget and strategy."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.budgets import Needs, budget_bytes
from moepic_core.errors import BadSettings, OutOfRoom
from moepic_core.geometry import record_stride, top_bytes
from moepic_core.spec import STRATEGIES, MoeLayer, Plan, Settings
from moepic_core.uniform import uniform_plan

LAYER = MoeLayer(0, num_experts=8, neurons=64, hidden=64, matrices=3, itemsize=4)  # 768 bytes a row
RECORD = 12 * 4096  # exactly; a top of 26 rows takes 5 units of 4096 bytes
NEEDS = Needs((LAYER, LAYER), top_k=2, resident=900_000, kv=90_000, workspace=10_000)
FIXED = 1_000_000
STAGED = FIXED + 4 * RECORD  # staging in full
EVERYTHING = STAGED + 16 * RECORD


def plan_for(budget: int, needs: Needs = NEEDS, **settings: object) -> Plan:
    return uniform_plan(Settings.create(checkpoint="x", **settings), needs, budget)


@pytest.mark.parametrize(
    ("budget", "staging", "slots", "rows"),
    [
        (FIXED + 2 * RECORD, 2, (0, 0), 26),  # the smallest
        (FIXED + 3 * RECORD - 1, 2, (0, 0), 26),
        (FIXED + 3 * RECORD, 3, (0, 0), 26),
        (STAGED - 1, 3, (0, 0), 26),  # staging comes first
        (STAGED + 20480 - 1, 4, (0, 0), 26),
        (STAGED + 20480, 4, (1, 0), 26),
        (STAGED + 5 * 20480, 4, (3, 2), 26),
        (STAGED + 16 * 20480 - 1, 4, (8, 7), 26),
        (STAGED + 16 * 20480, 4, (8, 8), 26),
        (STAGED + 16 * 24576 - 1, 4, (8, 8), 26),  # 5 units hold 26 rows, 6 hold 32
        (STAGED + 16 * 24576, 4, (8, 8), 32),
        (EVERYTHING - 1, 4, (8, 8), 58),  # 11 units
        (EVERYTHING, 4, (8, 8), 64),
        (2 * EVERYTHING, 4, (8, 8), 64),
    ],
)
def test_plans_of_a_growing_budget(budget: int, staging: int, slots: tuple[int, ...], rows: int) -> None:
    plan = plan_for(budget)
    assert tuple(share.slots for share in plan.layers) == slots
    assert {(share.top_rows, share.split_ratio) for share in plan.layers} == {(rows, rows / 64)}
    memory = plan.memory
    assert (plan.staging_records, memory.staging) == (staging, staging * RECORD)
    assert (memory.resident, memory.kv, memory.workspace, memory.budget) == (900_000, 90_000, 10_000, budget)
    assert memory.cache == sum(slots) * top_bytes(LAYER, rows)
    assert plan.prefetch_depth == min(2, staging - 1)


@pytest.mark.parametrize("split", [0, 0.25, 0.5, 1])
def test_the_users_split_is_honoured(split: float) -> None:
    for budget in (NEEDS.smallest, STAGED + 16 * 20480, EVERYTHING):
        plan = plan_for(budget, split=split)
        assert {(share.top_rows, share.split_ratio) for share in plan.layers} == {(int(64 * split), split)}
    slots = {0: 0, 0.25: 8, 0.5: 8, 1: 8}[split]
    assert [share.slots for share in plan.layers] == [slots, slots]  # under the largest budget


def test_layers_of_different_shapes_share_round_by_round() -> None:
    small = MoeLayer(1, num_experts=2, neurons=64, hidden=64, matrices=2, itemsize=2)  # a record of 4 units
    needs = Needs((LAYER, small), top_k=1, resident=0, kv=0, workspace=0)
    plan = plan_for(2 * RECORD + 3 * (RECORD + 4 * 4096) + 4096, needs, split=1.0)
    assert [share.slots for share in plan.layers] == [3, 2]  # the small layer has no third expert
    plan = plan_for(2 * RECORD + 3 * RECORD, needs, split=1.0)
    assert [share.slots for share in plan.layers] == [2, 2]  # what is too little for the first may do for the second


@pytest.mark.parametrize(
    ("strategy", "slots", "rows", "eviction", "predictor", "depth"),
    [
        ("moepic", (4, 4), 26, "lcp-aged", "next-router", 2),
        ("mixtral-offloading", (2, 1), 64, "lru", "next-router", 2),
        ("adapmoe", (2, 1), 64, "lru", "next-router", 2),
        ("moe-infinity", (2, 1), 64, "request-frequency", "activation-matrices", 2),
        ("pregated", (0, 0), 0, "lru", "next-router", 2),
        ("on-demand", (0, 0), 0, "lru", "none", 0),
    ],
)
def test_every_strategy(
    strategy: str, slots: tuple[int, int], rows: int, eviction: str, predictor: str, depth: int
) -> None:
    plan = plan_for(STAGED + 8 * 20480, strategy=strategy)
    assert [(share.slots, share.top_rows) for share in plan.layers] == [(slots[0], rows), (slots[1], rows)]
    assert (plan.strategy, plan.eviction, plan.predictor, plan.prefetch_depth) == (strategy, eviction, predictor, depth)
    assert plan.misses == "fetch"


def test_no_strategy_is_without_a_test() -> None:
    (mark,) = (mark for mark in test_every_strategy.pytestmark if mark.name == "parametrize")
    assert {row[0] for row in mark.args[1]} == set(STRATEGIES)


def test_eviction_and_prefetch_override_the_strategy() -> None:
    plan = plan_for(EVERYTHING, strategy="on-demand", eviction="lfu", prefetch="on")
    assert (plan.eviction, plan.predictor, plan.prefetch_depth) == ("lfu", "next-router", 2)
    plan = plan_for(EVERYTHING, prefetch="off")
    assert (plan.eviction, plan.predictor, plan.prefetch_depth) == ("lcp-aged", "none", 0)


@pytest.mark.parametrize(("asked", "made"), [("on", 2), ("off", 0), (0, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("strategy", ["moepic", "adapmoe", "on-demand"])
def test_prefetch_is_how_many_experts_are_guessed(strategy: str, asked: str | int, made: int) -> None:
    for budget in (STAGED, EVERYTHING):
        plan = plan_for(budget, strategy=strategy, prefetch=asked)
        assert (plan.predictor, plan.prefetch_depth) == ("next-router" if made else "none", made)
    assert plan_for(NEEDS.smallest, strategy=strategy, prefetch=asked).prefetch_depth == min(made, 1)  # of two buffers


def test_more_guesses_than_experts_in_use_are_refused() -> None:
    with pytest.raises(BadSettings, match="prefetch 3 is more than the 2 experts that a token uses in a layer; allow"):
        plan_for(EVERYTHING, prefetch=3)


@pytest.mark.parametrize(
    ("budget", "settings", "reason"),
    [
        (NEEDS.smallest, {}, "moepic: no expert is cached, every use streams from the host"),
        (EVERYTHING, {}, "moepic: all 16 experts are resident"),
        (EVERYTHING, {"strategy": "mixtral-offloading"}, "mixtral-offloading: all 16 experts are resident"),
        (STAGED + 5 * 20480, {},
         "moepic: slots for 5 of 16 tops, split ratio 0.40 everywhere (the paper's best uniform ratio)"),
        (STAGED + 16 * 24576, {},
         "moepic: slots for 16 of 16 tops, split ratio 0.50 everywhere (all tops fit, so tops grew)"),
        (STAGED + 5 * 20480, {"split": 0.25},
         "moepic: slots for 8 of 16 tops, split ratio 0.25 everywhere (as the strategy or the settings say)"),
    ],
)  # fmt: skip
def test_the_reason_is_a_sentence_for_people(budget: int, settings: dict[str, object], reason: str) -> None:
    assert plan_for(budget, **settings).reason == reason


layers = st.builds(
    MoeLayer,
    decoder_layer=st.just(0),
    num_experts=st.integers(1, 12),
    neurons=st.integers(1, 200),
    hidden=st.integers(1, 100),
    matrices=st.sampled_from((2, 3)),
    itemsize=st.sampled_from((2, 4)),
)
needs_of_models = st.builds(
    Needs,
    layers=st.lists(layers, min_size=1, max_size=5).map(tuple),
    top_k=st.integers(1, 4),
    resident=st.integers(0, 10**6),
    kv=st.integers(0, 10**5),
    workspace=st.integers(0, 10**5),
)
wishes = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(sorted(STRATEGIES)),
        "split": st.none() | st.floats(0, 1),
        "prefetch": st.sampled_from(("auto", "on", "off", 0, 1)),
    }
)


@given(needs_of_models, wishes, st.lists(st.floats(0, 1.2), min_size=2, max_size=6))
def test_what_holds_for_every_plan(needs: Needs, settings: dict[str, object], shares: list[float]) -> None:
    cached = -1
    for share in sorted(shares):
        budget = needs.smallest + int(share * (needs.everything - needs.smallest))
        plan = plan_for(budget, needs, **settings)
        memory = plan.memory
        assert memory.used <= memory.budget == budget
        assert memory.staging == plan.staging_records * needs.record
        assert memory.smallest <= needs.fixed + needs.staging_records * needs.record
        assert memory.cache >= cached, "more budget, fewer cached bytes"
        cached = memory.cache
        sizes = [
            share.slots * top_bytes(layer, share.top_rows)
            for layer, share in zip(needs.layers, plan.layers, strict=True)
        ]
        assert memory.cache == sum(sizes)
        for layer, layer_plan in zip(needs.layers, plan.layers, strict=True):
            assert 0 <= layer_plan.slots <= layer.num_experts
            assert 0 <= layer_plan.top_rows <= layer.neurons
            assert layer_plan.split_ratio == layer_plan.top_rows / layer.neurons
            assert layer_plan.slots == 0 or layer_plan.top_rows > 0
        assert 2 <= plan.staging_records <= needs.staging_records
        assert 0 <= plan.prefetch_depth < plan.staging_records  # a guess never takes the last buffer
        assert (plan.prefetch_depth > 0) == (plan.predictor != "none")


@given(needs_of_models)
def test_everything_means_all_experts_whole(needs: Needs) -> None:
    whole = plan_for(needs.everything, needs)
    assert [(share.slots, share.split_ratio) for share in whole.layers] == [
        (layer.num_experts, 1) for layer in needs.layers
    ]
    assert whole.memory.cache == sum(layer.num_experts * record_stride(layer) for layer in needs.layers)
    assert whole.memory.used == needs.everything
    assert budget_bytes(needs.smallest, needs, 0) == needs.smallest
    with pytest.raises(OutOfRoom):
        budget_bytes(needs.smallest - 1, needs, 0)


def test_a_large_model_is_planned_while_a_slider_moves() -> None:
    layer = MoeLayer(0, num_experts=256, neurons=2048, hidden=7168, matrices=3, itemsize=2)
    needs = Needs((layer,) * 64, top_k=8, resident=10**10, kv=10**9, workspace=10**9)
    start_s = time.perf_counter()
    for percent in (20, 50, 80):
        plan_for(budget_bytes(f"{percent}%", needs, 0), needs)
    assert time.perf_counter() - start_s < 1
