"""Pictures on demand: each shows exactly what trace, cost model, simulator and hit curves say, and says what it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_live import LAYERS, PLAN, served
from test_metrics import NUM_EXPERTS, NUM_LAYERS

from app import explore
from app.elsewhere import elsewhere
from app.explore import Budgets
from app.explorer import VIEWS, Explorer
from app.state import State
from moepic_core.budgets import Needs
from moepic_core.costs import Costs, LayerCosts
from moepic_core.errors import BadSettings, Cancelled
from moepic_core.eviction import make_policy
from moepic_core.planner import make_plan
from moepic_core.routing import RoutingTrace
from moepic_core.simulator import simulate
from moepic_core.spec import STRATEGIES, Settings
from moepic_core.telemetry import Telemetry
from moepic_core.trace import EVENT, EventKind, TracePhase, decoded

SETTINGS = Settings.create(checkpoint="small")
NEEDS = Needs(LAYERS, 2, 10_000, 5_000, 2_000)
COSTS = Costs(
    tuple(LayerCosts(1e-4, 1e-5, 1e-5, 1e-5, 1e-7, 1e-10, 1e-6) for _ in LAYERS), 1e-4, 1e8, 1e-5, 1 << 16, "estimated"
)


@pytest.fixture(scope="module")
def telemetry() -> Telemetry:
    return served(replies=2, tokens=60)


@pytest.fixture(scope="module")
def trace(telemetry: Telemetry) -> RoutingTrace:
    return decoded(telemetry.trace(), [NUM_EXPERTS] * NUM_LAYERS, "recorded", {})


# ---- timeline ----


def test_the_timeline_is_every_event_of_the_last_tokens(telemetry: Telemetry) -> None:
    events = telemetry.trace().events
    figure = explore.timeline(events)
    assert figure is not None
    tokens = events[(events["kind"] == EventKind.TOKEN) & (events["reply"] == 2)][-explore.TIMELINE_TOKENS :]
    start_s = tokens["start_s"][0]
    for kind, lane in zip(explore._LANES, figure["data"], strict=True):
        rows = events[np.isin(events["token"], tokens["token"]) & (events["kind"] == kind)]
        assert len(rows)
        assert lane["y"] == rows["layer"].tolist()
        np.testing.assert_allclose(lane["base"], 1000 * (rows["start_s"] - start_s), atol=1e-4)
        np.testing.assert_allclose(lane["x"], 1000 * (rows["end_s"] - rows["start_s"]), atol=1e-4)
        assert lane["hovertext"][0].startswith(f"layer {rows['layer'][0]}")
    ends = [line["x0"] for line in figure["layout"]["shapes"]]
    np.testing.assert_allclose(ends, 1000 * (tokens["end_s"] - start_s), atol=1e-4)
    assert figure["layout"]["xaxis"]["range"] == [ends[-3], ends[-1]]
    assert f"last {len(tokens)} tokens" in figure["note"]


def test_a_timeline_too_full_shows_whole_tokens_only(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "TIMELINE_EVENTS", 40)
    events = telemetry.trace().events
    figure = explore.timeline(events)
    assert figure is not None
    shown = len(figure["layout"]["shapes"])
    assert 1 <= shown < explore.TIMELINE_TOKENS
    newest = events[events["kind"] == EventKind.TOKEN]["token"][-shown:]
    wanted = np.isin(events["token"], newest) & np.isin(events["kind"], list(explore._LANES))
    assert sum(len(lane["x"]) for lane in figure["data"]) == wanted.sum()


def test_no_token_no_timeline() -> None:
    prompt = np.zeros(1, EVENT)
    prompt["kind"], prompt["phase"] = EventKind.TOKEN, TracePhase.PREFILL
    assert explore.timeline(prompt) is None
    assert explore.timeline(prompt[:0]) is None


# ---- budgets ----


def test_lines_are_predicted_and_diamonds_simulated(trace: RoutingTrace) -> None:
    present = (NEEDS.smallest + NEEDS.everything) // 2
    axis = explore.axis_of_budgets(NEEDS, present)
    assert (axis[0], axis[-1], present in axis) == (NEEDS.smallest, NEEDS.everything, True)
    found = {
        name: explore.budgets_of(explore.as_strategy(SETTINGS, name), NEEDS, COSTS, trace, axis, present)
        for name in STRATEGIES
    }
    figure = explore.budgets_figure(found, present, 0.123, "moepic", "120 tokens")
    lines = {line["name"]: line for line in figure["data"]}
    assert set(lines) == {*STRATEGIES, *(f"{name}, simulated" for name in STRATEGIES), "measured: last answer"}
    for name in STRATEGIES:
        assert lines[name]["x"] == [round(at / 1e6, 6) for at in axis]
        plan = make_plan(explore.as_strategy(SETTINGS, name), NEEDS, present, COSTS, trace)
        assert plan.predicted is not None
        # The planner's steps of memory depend on the largest budget that it is asked about.
        assert lines[name]["y"][axis.index(present)] == pytest.approx(1000 * plan.predicted.total_s, rel=0.05)
        wanted = simulate(trace, plan, COSTS, LAYERS, warm_up=trace.num_tokens // 4).tpot_s
        np.testing.assert_allclose(lines[f"{name}, simulated"]["y"], [1000 * wanted], atol=1e-5)
    assert lines["measured: last answer"]["y"] == [123.0]
    assert lines["moepic"]["line"]["width"] > lines["adapmoe"]["line"]["width"]
    assert "predicted" in figure["note"] and "simulated" in figure["note"]


def test_without_routing_nothing_is_called_simulated() -> None:
    found = {name: Budgets([], None) for name in STRATEGIES}
    figure = explore.budgets_figure(found, 1, None, "moepic", "assumed routing")
    assert "simulated" not in figure["note"]
    assert len(figure["data"]) == len(STRATEGIES)


# ---- sizes ----


def replayed(experts: np.ndarray, policy: str, slots: int) -> int:
    """Hits of a cache of `slots`, by its rules in plain words: one layer."""
    made, cache, hits = make_policy(policy, NUM_EXPERTS), [], 0
    for now, used in enumerate(experts.tolist()):
        for expert in used:
            made.touch(expert, now)
        hits += sum(expert in cache for expert in used)
        for expert in used:
            if expert in cache:
                continue
            if len(cache) >= slots:
                victims = [other for other in cache if other not in used]
                if not victims:
                    continue
                cache.remove(min(victims, key=lambda other: (made.priority(other, now), other)))
            cache.append(expert)
    return hits


@pytest.mark.parametrize("policy", ["lcp-aged", "lru", "lfu"])
def test_hit_curves_are_those_of_real_caches(trace: RoutingTrace, policy: str) -> None:
    one = replace(trace, replies=np.zeros(trace.num_tokens, np.int32))  # begin_request is not replayed above
    shares, hits = explore.policy_curve(one, policy)
    assert shares == [round(slots / NUM_EXPERTS, 6) for slots in range(NUM_EXPERTS + 1)]
    for slots in (0, 2, 4, NUM_EXPERTS):
        wanted = sum(replayed(one.experts[:, layer], policy, slots) for layer in range(NUM_LAYERS))
        assert hits[slots] == pytest.approx(wanted / one.experts.size, abs=1e-6)


def test_nothing_beats_belady(trace: RoutingTrace) -> None:
    shares = explore.belady_shares(trace)
    assert (shares[0], shares[-1]) == (0, 1)
    curves = {policy: explore.policy_curve(trace, policy) for policy in explore.POLICIES}
    best = {share: explore.belady_size(trace, share) for share in shares}
    for _, hits in curves.values():
        assert hits == sorted(hits)
        for share in shares:
            assert hits[round(share * NUM_EXPERTS)] <= best[share] + 1e-6
    figure = explore.sizes_figure(curves, best, PLAN.layers, trace)
    assert [line["name"] for line in figure["data"]][-1].startswith("Belady")
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(100 * 9 / 21)
    assert f"{trace.num_tokens} tokens made on this machine" in figure["note"]
    assert explore.newest(trace.last(70)).num_tokens == 70


# ---- over a real engine ----


@pytest.fixture(scope="module")
def state(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        folder = checkpoints("qwen3_moe")
        state = State(Settings.create(checkpoint=str(folder), device="cpu", link="emulated:20MB/s",
                                      vram="50% of experts", context_length=256))  # fmt: skip
        yield state
        state.close()


def test_views_refuse_until_there_is_something_and_then_are_made(state: State) -> None:
    explorer = Explorer(state)
    for view in VIEWS:
        with pytest.raises(BadSettings, match="no model is loaded"):
            explorer.make(view, lambda *_: None)
    state.load(state.settings)
    state.wait()
    for view in ("timeline", "sizes"):
        with pytest.raises(BadSettings, match="ask something first"):
            explorer.make(view, lambda *_: None)
    list(state.reply([{"role": "user", "content": "what?"}], 0.0, 1.0, 40, lambda: False))
    for view in VIEWS:
        explorer.start(view)
    for view in VIEWS:
        explorer._jobs[view].wait()
        shown = explorer.view(view)
        assert shown["error"] is None
        assert len(shown["figure"]["data"]) >= 4
    explorer.close()
    assert not {thread.name for thread in threading.enumerate()} & {f"moepic-{view}" for view in VIEWS}


def test_work_elsewhere_ends_when_it_is_told_to() -> None:
    def stop(share: float, text: str) -> None:
        if share:
            raise Cancelled("stopped")

    with elsewhere(stop) as away:
        assert away((0.0, "counting"), sum, [1, 2, 3]) == 6
        with pytest.raises(Cancelled):
            away((0.5, "counting"), sum, [1, 2, 3])
