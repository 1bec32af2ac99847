"""Every number that the panels show follows from the exported trace; memory adds up; unknown is never zero."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import NUM_EXPERTS, NUM_LAYERS, TOP_K, recompute

from app import gauges, live, terms
from app.live import TIME_STEPS, WIRE, Ceiling, Heard
from app.nouns import Loaded, Look
from app.sensors import Sample
from app.views import UNKNOWN, percent
from app.watch import Listener, find_ceiling
from moepic_core.budgets import Needs
from moepic_core.links import parse_link
from moepic_core.metrics import METRICS
from moepic_core.spec import LayerPlan, MachineProfile, MemoryPlan, ModelSpec, MoeLayer, Plan, Settings
from moepic_core.telemetry import EventKind, Outcome, Part, Telemetry
from moepic_core.trace import TracePhase, used_experts, whole_tokens
from moepic_core.units import format_bytes

GB = 10**9
LAYERS = tuple(MoeLayer(number, NUM_EXPERTS, 64, 32, 3, 2) for number in range(NUM_LAYERS))
SPEC = ModelSpec(
    path="/models/small", name="small", model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", dtype="bfloat16",
    num_layers=3, moe_layers=LAYERS, top_k=TOP_K, hidden=32, vocab_size=100, context_length=64, resident_bytes=GB,
    kv_bytes_per_token=100, num_parameters=10, active_parameters=5, file_bytes=20, shards=(), fingerprint="0",
)  # fmt: skip
MEMORY = MemoryPlan(GB, GB // 2, GB // 4, GB // 8, 2 * GB, 4 * GB)
PLAN = Plan(
    tuple(LayerPlan(2 + layer, 32, 0.5 + layer / 10) for layer in range(NUM_LAYERS)), 4, "lcp", "next-router", 2,
    "fetch", MEMORY, "moepic", "because",
)  # fmt: skip
CPU = MachineProfile("cpu", "CPU", 32 * GB, 24 * GB, 32 * GB, 24 * GB, 8)
LOADED = Loaded(
    Settings.create(checkpoint="small", link="emulated:2GB/s"), SPEC, CPU, parse_link("emulated:2GB/s", "cpu"),
    Needs(LAYERS, TOP_K, GB, GB, GB), True, (),
)  # fmt: skip


def served(replies: int = 2, tokens: int = 20, seed: int = 1) -> Telemetry:
    """A session: random routing, outcomes and transfers, at times that are multiples of 1/1024 s."""
    dice = np.random.default_rng(seed)
    telemetry, now, number = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K), 0.0, 0
    telemetry.set_plan(PLAN, {kind: getattr(MEMORY, kind) for kind in ("resident", "kv", "workspace", "cache")})
    for _ in range(replies):
        telemetry.begin_reply(now, 5, 0)
        for made in range(tokens + 1):
            start = now
            for layer in range(NUM_LAYERS):
                experts = dice.choice(NUM_EXPERTS, TOP_K, replace=False).tolist()
                telemetry.layer_step(layer, number, experts, dice.choice(list(Outcome), TOP_K).tolist(), [1] * TOP_K)
                for expert in experts:
                    for kind in (EventKind.DEMAND, EventKind.PREFETCH, EventKind.COMPUTE, EventKind.STALL):
                        if dice.random() < 0.6:
                            begin = now + dice.integers(0, 8) / 1024
                            end = begin + dice.integers(1, 16) / 1024
                            nbytes = int(dice.integers(1, 4)) * 1000 if kind >= EventKind.DEMAND else 0
                            telemetry.event(kind, layer, expert, Part.BOTTOM, begin, end, nbytes, number)
                    kind = (EventKind.USED, EventKind.WASTED)[int(dice.random() < 0.3)]
                    telemetry.event(kind, layer, expert, Part.WHOLE, now, now, 500, number)
                now += dice.integers(4, 24) / 1024
            now = max(now, start + 1 / 1024)
            telemetry.read_prompt(5) if made == 0 else None
            telemetry.new_token(number, now)
            number += 1
        telemetry.end_reply()
    return telemetry


def look_at(telemetry: Telemetry) -> Look:
    residency = [[(layer + expert) % 3 for expert in range(NUM_EXPERTS)] for layer in range(NUM_LAYERS)]
    return Look(1, None, None, LOADED, telemetry.snapshot(residency))


@pytest.fixture(scope="module")
def telemetry() -> Telemetry:
    return served()


@pytest.fixture(scope="module")
def seen(telemetry: Telemetry) -> dict[str, Any]:
    """As it arrives in the browser."""
    shown = live.see(look_at(telemetry), Listener().hear(telemetry, 0.0), None)
    return dict(json.loads(json.dumps(shown)))


@pytest.mark.parametrize(("scope", "reply"), [("last", 2), ("session", None)])
def test_layers_follow_from_the_trace(
    telemetry: Telemetry, seen: dict[str, Any], scope: str, reply: int | None
) -> None:
    trace, shown = telemetry.trace(), seen["layers"][scope]
    rates = []
    for layer in range(NUM_LAYERS):
        names = recompute(trace, reply=reply, phases=[TracePhase.DECODE], layer=layer)
        told = [shown[column][layer] for column in ("hits", "partial", "misses")]
        assert told == [names["hits"], names["partial_hits"], names["misses"]]
        rates.append(names["miss_rate"])
    total = recompute(trace, reply=reply, phases=[TracePhase.DECODE])
    assert shown["texts"] == {
        "hits": percent(total["hit_rate"]),
        "partial": percent(total["partial_hit_rate"]),
        "misses": percent(total["miss_rate"]),
        "accuracy": percent(total["prefetch_accuracy"]),
        "worst": ", ".join(map(str, sorted(range(NUM_LAYERS), key=lambda layer: -rates[layer]))),
        "ceiling": UNKNOWN,
    }
    assert shown["ceiling"] is None
    assert percent(total["hit_rate"]) in shown["label"]


def test_plan_and_experts_follow_from_the_snapshot(telemetry: Telemetry, seen: dict[str, Any]) -> None:
    layers, heat = seen["layers"], seen["heat"]
    assert (layers["slots"], layers["split"], layers["experts"]) == ([2, 3, 4], [0.5, 0.6, 0.7], [NUM_EXPERTS] * 3)
    assert layers["texts"] == {"split": "0.50 to 0.70", "slots": "2 to 4"}
    snapshot = look_at(telemetry).snapshot
    assert snapshot is not None
    assert snapshot.residency is not None
    cells = np.frombuffer(b64decode(heat["cells"]), np.uint8).reshape(NUM_LAYERS, NUM_EXPERTS)
    np.testing.assert_array_equal(cells >> 6, snapshot.residency)
    activations = recompute(telemetry.trace(), phases=[TracePhase.DECODE])["activations"]
    use = eval(terms._ALL["use"].formula.replace("axis=1", "axis=1, keepdims=True"), {"activations": activations})
    np.testing.assert_array_equal(cells & 63, np.ceil(63 * use))
    on_device = int((snapshot.residency > 0).sum())
    whole = int((snapshot.residency == 2).sum())
    assert heat["texts"] == {"on-device": f"{on_device} of 21", "whole": str(whole), "tops": str(on_device - whole)}


def test_speed_follows_from_the_trace(telemetry: Telemetry, seen: dict[str, Any]) -> None:
    events = telemetry.trace().events
    tokens = events[(events["kind"] == EventKind.TOKEN) & (events["phase"] == TracePhase.DECODE)]
    names = {"np": np, "TOKEN": EventKind.TOKEN, "kind": tokens["kind"], "seconds": tokens["end_s"] - tokens["start_s"]}
    assert seen["speed"]["rates"] == eval(terms._ALL["speed_history"].formula, names).round(2).tolist()
    assert seen["speed"]["texts"] == {"speed": f"{eval(terms._ALL['speed_now'].formula, names):.1f}"}
    assert seen["speed"]["starts"] == [20]


def test_the_last_token_follows_from_the_trace(telemetry: Telemetry, seen: dict[str, Any]) -> None:
    events, shown = telemetry.trace().events, seen["token"]
    token = events[events["kind"] == EventKind.TOKEN][-1]
    rows = events[(events["token"] == token["token"]) & np.isin(events["kind"], live.SHOWN)]
    seconds = rows["end_s"] - rows["start_s"]
    stall = seconds[rows["kind"] == EventKind.STALL].sum()
    moved = rows[rows["kind"] >= EventKind.DEMAND]
    ticks = np.arange(0, (events["end_s"].max() + 1) * 1024) / 1024 + 1 / 2048  # in the middle of each 1/1024 s
    busy = ((moved["start_s"][:, None] < ticks) & (moved["end_s"][:, None] > ticks)).any(axis=0).sum() / 1024
    assert shown["seconds"] == token["end_s"] - token["start_s"]
    assert shown["texts"] == {
        "token": live.milliseconds(token["end_s"] - token["start_s"]),
        "stall": live.milliseconds(stall),
        "overlap": percent(max(0, 1 - stall / busy)),
        "moved": format_bytes(int(moved["nbytes"].sum())),
        "accuracy": percent(recompute(telemetry.trace(), reply=2, phases=[TracePhase.DECODE])["prefetch_accuracy"]),
    }
    wire = np.frombuffer(b64decode(shown["events"]), WIRE)
    np.testing.assert_array_equal(wire["what"] >> 2, rows["kind"])
    np.testing.assert_array_equal(wire["what"] & 3, rows["part"])
    for name in ("layer", "expert"):
        np.testing.assert_array_equal(wire[name], rows[name])
    assert [shown["sizes"][size] for size in wire["size"]] == [format_bytes(nbytes) for nbytes in rows["nbytes"]]
    for name in ("start", "end"):
        wanted = (rows[f"{name}_s"] - token["start_s"]) / (token["end_s"] - token["start_s"])
        np.testing.assert_allclose(wire[name] / TIME_STEPS, wanted.clip(0, 1), atol=1 / TIME_STEPS)


def test_the_ceiling_is_belady_on_the_recorded_trace(telemetry: Telemetry) -> None:
    """Against every choice of victims that there is, on a trace this short."""
    rows = whole_tokens(telemetry.trace(), NUM_LAYERS)
    ceiling = find_ceiling(rows, [NUM_EXPERTS] * NUM_LAYERS, 1, 2, lambda _: None)
    assert (ceiling.loads, ceiling.reply, ceiling.num_tokens) == (1, 2, 40)
    for layer, share in enumerate(PLAN.layers):
        found = ceiling.session[layer]
        assert found is not None
        assert found * 80 == best_hits(used_experts(rows[:, layer]).tolist(), share.slots)
    shown = live.see(look_at(telemetry), Heard(), ceiling)["layers"]
    assert shown["session"]["ceiling"] == [round(part or 0, 4) for part in ceiling.session]
    assert shown["last"]["ceiling"] == [round(part or 0, 4) for part in ceiling.last_reply]
    assert shown["session"]["texts"]["ceiling"] == percent(sum(part or 0 for part in ceiling.session) / NUM_LAYERS)


def test_a_ceiling_is_shown_beside_the_uses_that_it_is_of(telemetry: Telemetry) -> None:
    rows = whole_tokens(telemetry.trace(), NUM_LAYERS)
    ceiling = find_ceiling(rows, [NUM_EXPERTS] * NUM_LAYERS, 1, 2, lambda _: None)
    now = look_at(telemetry).snapshot
    assert now is not None and ceiling.beside(now) == (ceiling.last_reply, ceiling.session)
    assert replace(ceiling, reply=1).beside(now) == (None, ceiling.session)
    assert replace(ceiling, reply_uses=ceiling.reply_uses // 2).beside(now) == (None, ceiling.session)
    assert replace(ceiling, session_uses=ceiling.session_uses // 2).beside(now) == (ceiling.last_reply, None)
    full = replace(ceiling, reply_uses=0, session_uses=0, num_tokens=terms.CEILING_TOKENS)
    assert full.beside(now) == (ceiling.last_reply, ceiling.session)


def test_each_token_counts_with_the_slots_of_its_time() -> None:
    telemetry = served()
    narrow = [share.slots for share in PLAN.layers]
    of_narrow = find_ceiling(whole_tokens(telemetry.trace(), NUM_LAYERS), [NUM_EXPERTS] * NUM_LAYERS, 1, 2, print)
    telemetry.set_plan(replace(PLAN, layers=tuple(replace(share, slots=NUM_EXPERTS) for share in PLAN.layers)), {})
    of_both = find_ceiling(whole_tokens(telemetry.trace(), NUM_LAYERS), [NUM_EXPERTS] * NUM_LAYERS, 1, 2, print)
    assert of_both.session == of_narrow.session, "a new plan says nothing about what was counted under the old one"
    telemetry.begin_reply(1000.0, 1, 0)
    telemetry.new_token(1000, 1000.0)
    for token in (1001, 1002):
        for layer in range(NUM_LAYERS):
            telemetry.layer_step(layer, token, [0, 1], [Outcome.HIT] * 2, [1, 1])
    rows = whole_tokens(telemetry.trace(), NUM_LAYERS)
    assert rows["slots"][-3:].tolist() == [narrow, [NUM_EXPERTS] * NUM_LAYERS, [NUM_EXPERTS] * NUM_LAYERS]


def best_hits(tokens: list[list[int]], slots: int) -> int:
    """The most hits of any cache in which a token's experts all end up, found by trying everything."""
    from itertools import combinations

    caches: dict[frozenset[int], int] = {frozenset(): 0}
    for experts in tokens:
        following: dict[frozenset[int], int] = {}
        for cache, hits in caches.items():
            gained = hits + len(cache & set(experts))
            old = sorted(cache - set(experts))
            for kept in combinations(old, max(0, min(len(old), slots - len(experts)))):
                key = frozenset(experts) | frozenset(kept)
                following[key] = max(following.get(key, 0), gained)
        caches = following
    return max(caches.values())


def test_nothing_is_shown_as_unknown() -> None:
    for look in (Look(0, None, None, None, None), Look(1, None, None, LOADED, Telemetry(3, 7, 2).snapshot())):
        shown = live.see(look, Heard(), None)
        assert (shown["layers"], shown["heat"], shown["token"]) == (None, None, None)
        assert (shown["speed"]["rates"], shown["speed"]["texts"]) == ([], {"speed": UNKNOWN})
    fresh = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K)
    fresh.set_plan(PLAN, {})
    texts = live.see(look_at(fresh), Heard(), None)["layers"]["last"]["texts"]
    assert set(texts.values()) == {UNKNOWN}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_covered_time_is_the_union(spans: list[tuple[int, int]]) -> None:
    events = np.array([(start, start + length) for start, length in spans], [("start_s", "f8"), ("end_s", "f8")])
    union = {moment for start, length in spans for moment in range(start, start + length)}
    assert live.covered(events) == len(union)


# ---- hardware ----


def test_every_meter_is_a_reading_or_not_available(telemetry: Telemetry) -> None:
    look = look_at(telemetry)
    sample = Sample(
        "recorded: card.jsonl", None, "Card 12", 9 * GB, 12 * GB, 6 * GB, 0.45, 8.7e9, 2.5e8, 3.15e10, 181.0, 362.0,
        61.0, 87.0, 16 * GB, 32 * GB, GB, 0.5, 3e8, 6e8,
    )  # fmt: skip
    shown = gauges.hardware(sample, look, 1e9)
    assert shown["source"] == "recorded: card.jsonl"
    assert {name: meter["text"] for name, meter in shown["meters"].items()} == {
        "experts": "1 GB/s", "gpu": "45 %", "pcie-in": "8.7 GB/s", "pcie-out": "250 MB/s", "power": "181 W",
        "temperature": "61 °C", "cpu": "50 %", "ram": "16 GB", "vram": "9 GB", "disk": "300 MB/s",
    }  # fmt: skip
    shares = {name: meter["share"] for name, meter in shown["meters"].items()}
    assert shares == pytest.approx({
        "experts": 0.5, "gpu": 0.45, "pcie-in": 8.7 / 31.5, "pcie-out": 0.25 / 31.5, "power": 0.5,
        "temperature": 61 / 87, "cpu": 0.5, "ram": 0.5, "vram": 0.75, "disk": 0.5,
    })  # fmt: skip
    absent = gauges.hardware(None, replace(look, loaded=None, snapshot=None), 0.0)
    assert absent["memory"] is None
    texts = {name: meter["text"] for name, meter in absent["meters"].items()}
    assert texts.pop("experts") == UNKNOWN
    assert set(texts.values()) == {gauges.NOT_AVAILABLE}
    assert all(meter["share"] is None for meter in absent["meters"].values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("own", [None, 6 * GB])
def test_the_memory_bar_sums_to_what_the_driver_says(telemetry: Telemetry, device: str, own: int | None) -> None:
    machine = replace(CPU, device=device)  # type: ignore[arg-type]
    look = replace(look_at(telemetry), loaded=replace(LOADED, machine=machine, link=parse_link("auto", machine.device)))
    sample = (
        Sample(vram_used_bytes=9 * GB, vram_total_bytes=12 * GB, vram_own_bytes=own)
        if device == "cuda"
        else Sample(ram_used_bytes=9 * GB, ram_total_bytes=12 * GB, ram_own_bytes=own)
    )
    bar = gauges.memory(sample, look)
    assert bar is not None
    assert bar["name"] == {"cuda": "VRAM", "cpu": "RAM"}[device]
    assert bar["text"] == "9 GB of 12 GB"
    assert sum(part["share"] for part in bar["parts"]) == pytest.approx(9 / 12)
    assert bar["budget"] == {"text": "4 GB", "share": 4 / 12}
    kinds = [part["kind"] for part in bar["parts"]]
    assert kinds[-1] == ("rest" if own is None else "others")
    assert {"resident", "cache", "staging"} <= set(kinds)


amounts = st.integers(0, 50)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(gauges.NEVER_TOUCHED), amounts), amounts, st.none() | amounts)
def test_memory_parts_always_add_up(held: dict[str, int], used: int, own: int | None) -> None:
    parts = gauges.memory_parts(held, used, own)
    assert sum(parts.values()) == used
    assert min(parts.values()) >= 0
    assert all(parts[kind] <= nbytes for kind, nbytes in held.items())
    known = used if own is None else min(own, used)
    if sum(held.values()) <= known:
        assert {kind: parts[kind] for kind in held} == held
    elif own is not None:
        assert (parts["unaccounted"], parts["others"]) == (0, used - known)


# ---- words ----


def test_every_figure_has_one_definition_and_the_page_lists_it() -> None:
    names = [metric.name for metric in (*METRICS, *terms.PAGE_METRICS)]
    assert len(names) == len(set(names))
    page = terms.page()
    assert all(f'<tr id="{name}">' in page for name in names)
    assert terms.term("<b>", "overlap").startswith('<a class="term" href="ui/metrics#overlap"')
    assert "&lt;b&gt;" in terms.term("<b>", "overlap")
    assert all(metric.unit and metric.definition.endswith(".") for metric in terms.PAGE_METRICS)


def test_ceilings_differ_when_anything_does() -> None:
    one = Ceiling(1, 1, 10, (0.5,), (0.5,))
    assert hash(one) == hash(Ceiling(1, 1, 10, (0.5,), (0.5,)))
    assert one != replace(one, session=(0.6,))
