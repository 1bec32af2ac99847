"""How far replies are from predictions, in exact numbers, and costs that follow: on made-up events and on an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_routing import toy_costs, toy_layer

from moepic_core.costs import Breakdown, Costs
from moepic_core.drift import FEWEST_TOKENS, KEPT, Drift, drift_of, followed, forecast_error, is_stale
from moepic_core.spec import LayerPlan, MemoryPlan, Plan
from moepic_core.trace import EVENT, EventKind, Part, TracePhase

LAYER, NUM_LAYERS, TOP_ROWS = toy_layer(), 3, 10
COSTS = dataclasses.replace(toy_costs(LAYER, NUM_LAYERS, 2, 2.9), error=0.03)
LAYERS = (LAYER,) * NUM_LAYERS
STALL_S = 2e-4


def reply(tokens: int, compute: float, link: float, number: int = 1) -> np.ndarray:  # type: ignore[type-arg]
    """Tokens of two experts per layer, one whole and one in two parts, as many times slower than COSTS say."""
    rows, now = [], 5.0

    def put(kind: EventKind, layer: int, part: int, start: float, end: float, nbytes: int, token: int) -> None:
        rows.append((kind, TracePhase.DECODE, part, layer, part, number, token, nbytes, start, end))

    for token in range(tokens):
        began = now
        for layer, cost in enumerate(COSTS.layers):
            now += compute * cost.before_s
            start = now
            now += compute * (cost.step_s + cost.guess_s + 2 * cost.transfer_s) + STALL_S
            put(EventKind.STALL, layer, 0, start, start + STALL_S, 0, token)
            for part, length in ((Part.WHOLE, 40), (Part.TOP, TOP_ROWS), (Part.BOTTOM, 40 - TOP_ROWS)):
                end = now + compute * (cost.segment_s + length * cost.row_s)
                put(EventKind.COMPUTE, layer, part, now, end, 0, token)
                now = end
            for part, nbytes in ((Part.BOTTOM, 46080), (Part.WHOLE, 61440)):
                end = start + link * (COSTS.link_latency_s + nbytes / COSTS.link_bytes_per_s)
                put(EventKind.DEMAND, layer, part, start, (start + end) / 2, nbytes // 2, token)  # in two chunks
                put(EventKind.DEMAND, layer, part, (start + end) / 2, end, nbytes // 2, token)
                start = end
            put(EventKind.STEP, layer, 0, start, now, 0, token)
        now += compute * COSTS.after_s
        put(EventKind.TOKEN, -1, 0, began, now, 0, token)
    return np.array(rows, EVENT)


def plan_predicting(seconds: float | None) -> Plan:
    predicted = None if seconds is None else Breakdown(0.0, seconds, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    share = LayerPlan(3, TOP_ROWS, TOP_ROWS / LAYER.neurons)
    memory = MemoryPlan(0, 0, 0, 0, 0, 0)
    return Plan((share,) * NUM_LAYERS, 4, "lru", "next-router", 2, "fetch", memory, "moepic", "", predicted=predicted)


def token_s(compute: float) -> float:
    first = COSTS.layers[0]
    layer_s = first.before_s + first.step_s + first.guess_s + 2 * first.transfer_s
    layer_s += 3 * first.segment_s + 80 * first.row_s
    return compute * (NUM_LAYERS * layer_s + COSTS.after_s) + NUM_LAYERS * STALL_S


@pytest.mark.parametrize(("compute", "link"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 1.5), (3.0, 0.25)])
def test_both_factors_are_read_off_the_events(compute: float, link: float) -> None:
    events = np.concatenate((reply(20, 7.0, 7.0, number=1), reply(20, compute, link, number=2)))
    found = drift_of(events, 2, plan_predicting(0.01), LAYERS, COSTS)
    assert found == pytest.approx((token_s(compute) / 0.01, compute, link), rel=1e-6)


def test_one_disturbed_token_changes_nothing() -> None:
    events = reply(21, 1.0, 1.0)
    events["end_s"][(events["token"] == 20) & (events["kind"] == EventKind.TOKEN)] += 3.0
    assert drift_of(events, 1, plan_predicting(0.01), LAYERS, COSTS) == pytest.approx((token_s(1) / 0.01, 1, 1))


def test_what_says_too_little_says_nothing() -> None:
    assert drift_of(reply(FEWEST_TOKENS - 1, 1, 1), 1, plan_predicting(0.01), LAYERS, COSTS) is None
    assert drift_of(reply(FEWEST_TOKENS, 1, 1), 2, plan_predicting(0.01), LAYERS, COSTS) is None  # of another reply
    assert drift_of(reply(FEWEST_TOKENS, 1, 1), 1, plan_predicting(None), LAYERS, COSTS) is None
    events = reply(FEWEST_TOKENS + 2, 1, 1)
    lost = events[events["token"] > 2]  # and what the ring has forgotten
    assert drift_of(lost, 1, plan_predicting(0.01), LAYERS, COSTS) is None
    assert drift_of(np.array([], EVENT), 1, plan_predicting(0.01), LAYERS, COSTS) is None


@pytest.mark.parametrize(
    ("totals", "stale"),
    [
        ((2.0, 2.0), False),  # too few replies
        ((2.0, 2.0, 1.0), True),
        ((2.0, 1.0, 1.0), False),
        ((1.24, 1.24, 1.24), False),
        ((0.81, 0.81, 0.81), False),
        ((0.79, 0.79, 0.79), True),  # predictions 27 % too slow
        ((1.0, 1.0, 1.0, 1.26, 1.26), True),
        ((2.0, 2.0, 2.0, 1.0, 1.0), False),  # the last three count
    ],
)
def test_when_costs_are_stale(totals: tuple[float, ...], stale: bool) -> None:
    assert is_stale([Drift(total, 1.0, 1.0) for total in totals]) == stale


factors = st.floats(0.1, 10)
drifts = st.lists(st.builds(Drift, factors, factors, factors), min_size=3, max_size=KEPT)


@given(drifts)
def test_costs_that_followed_agree_with_the_replies(found: list[Drift]) -> None:
    """By the median of the last three, and what is measured again by them has not drifted."""
    new = followed(COSTS, found)
    compute, link = (float(np.median([getattr(each, name) for each in found[-3:]])) for name in ("compute", "link"))
    assert (new is COSTS) == (max(compute, 1 / compute, link, 1 / link) < 1.05)
    if new is COSTS:
        return
    again = drift_of(reply(FEWEST_TOKENS, compute, link), 1, plan_predicting(token_s(compute)), LAYERS, new)
    assert again == pytest.approx((1, 1, 1), rel=1e-6)
    assert f"computing took {compute:.2f} and transfers {link:.2f} times as long" in new.note
    assert new == dataclasses.replace(new, source="measured", error=COSTS.error, chunk_bytes=COSTS.chunk_bytes)


def test_only_times_follow() -> None:
    before = dataclasses.replace(COSTS.layers[0], drag=0.2)
    costs = dataclasses.replace(COSTS, layers=(before,) * NUM_LAYERS)
    after = followed(costs, [Drift(2.0, 2.0, 1.0)] * 3).layers[0]
    assert after.drag == 0.2
    assert dataclasses.astuple(after)[:-1] == tuple(2 * seconds for seconds in dataclasses.astuple(before)[:-1])


@pytest.mark.parametrize(
    ("totals", "error", "expected"),
    [
        ((), 0.03, 0.1),  # what is typical
        ((1.0, 1.0), 0.03, 0.1),
        ((), 0.2, 0.2),
        ((1.0, 1.0, 1.0), 0.03, 0.03),  # never less than the fit leaves open
        ((1.25,) * 5, 0.03, 0.2),  # 1 / 1.25 is 20 % too fast
        ((1.0, 1.0, 1.0, 1.0, 1.0, 5.0), 0.03, 0.03),  # one odd reply
        ((0.2,) * 3, 0.03, 1.0),
    ],
)
def test_the_range_of_a_forecast(totals: tuple[float, ...], error: float, expected: float) -> None:
    costs = dataclasses.replace(COSTS, error=error)
    assert forecast_error(costs, [Drift(total, 1.0, 1.0) for total in totals]) == pytest.approx(expected)


def test_costs_follow_the_machine(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """An engine that believes in a machine ten times slower finds out by three replies, plans anew and remembers."""
    from moepic_core.calibration import calibrate
    from moepic_core.engine import Engine
    from moepic_core.hf.text import Sampling
    from moepic_core.measuring import aside
    from moepic_core.spec import Settings

    settings = Settings.create(
        checkpoint=str(checkpoints("qwen3_moe")), device="cpu", link="emulated:50MB/s", vram="50% of experts"
    )
    slow = [Drift(10.0, 10.0, 1.0)] * 3

    def said(engine: Engine) -> None:
        list(engine.generate([5, 6, 7], Sampling(max_new_tokens=24, ignore_eos=True)))

    def compute_s(costs: Costs | None) -> float:
        assert costs is not None
        return costs.after_s + sum(layer.before_s + layer.step_s for layer in costs.layers)

    with Engine.load(settings, memory=tmp_path) as engine:
        believed = followed(calibrate(engine), slow)
        engine.learn(believed)
        with aside(engine):
            for _ in range(3):  # of what is recorded apart nothing is learnt
                said(engine)
        assert engine.steering.costs == believed
        for _ in range(3):
            assert engine.steering.costs == believed
            said(engine)
        found = engine.steering.costs
        assert compute_s(found) < 0.5 * compute_s(believed)
        assert "costs follow the last replies: computing took 0." in engine.plan.reason
        assert engine.steering.drifts == ()  # they were those of other costs
        engine.check()
    with Engine.load(settings, memory=tmp_path) as again:
        assert again.steering.costs == found
