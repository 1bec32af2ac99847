"""Is it helping? What is tried, what a run cost by its trace, what the table says; and afterwards all is as before."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_live import PLAN, served
from test_metrics import recompute

from app.conversation import Conversation, Message
from app.helping import DEFAULT_QUESTION, Helping, Measured, question, table
from app.jobs import Job, Tell
from app.state import State
from app.store import Store
from moepic_core import comparison
from moepic_core.ablation import LADDER, WARM_UP, Row, Tally, Variant, parts, tally, variants, verdict
from moepic_core.errors import BadSettings, Cancelled
from moepic_core.spec import LayerPlan, Settings
from moepic_core.trace import EventKind, TracePhase

SETTINGS = Settings.create(checkpoint="small")


def row(name: str, *speeds: float, depth: int = 2, **changes: Any) -> Row:
    plan = dataclasses.replace(PLAN, prefetch_depth=depth)
    return Row(Variant(name, changes), plan, tuple(Tally((1 / speed,) * 10, 20, 10, 5, 1000, 0.5) for speed in speeds))


# ---- what is tried ----


def test_the_present_settings_come_last_and_no_variant_twice() -> None:
    assert parts(PLAN) == ("cache", "split", "prefetch")
    names = [variant.name for variant in variants(SETTINGS, PLAN)]
    assert names == [*(name for name, _ in LADDER[:3]), "Cache + split + prefetch: your settings"]
    whole = dataclasses.replace(PLAN, layers=tuple(LayerPlan(2, 64, 1.0) for _ in PLAN.layers), predictor="none")
    assert parts(whole) == ("cache",)
    found = variants(SETTINGS, whole)
    assert [variant.name for variant in found] == [*(name for name, _ in LADDER), "Your settings: cache"]
    assert found[-1].changes == {}
    empty = dataclasses.replace(whole, layers=tuple(LayerPlan(0, 0, 0.0) for _ in PLAN.layers))
    assert variants(SETTINGS, empty)[-1].name == "Your settings: on demand"
    for variant in found:
        SETTINGS.replace(**variant.changes)


# ---- what it cost ----


def test_a_tally_is_the_trace_of_the_counted_tokens() -> None:
    telemetry = served(replies=2, tokens=20)
    found = tally(telemetry.trace(), 2)
    assert found is not None
    trace = telemetry.trace()
    made = trace.events[
        (trace.events["kind"] == EventKind.TOKEN)
        & (trace.events["reply"] == 2)
        & (trace.events["phase"] == TracePhase.DECODE)
    ][WARM_UP:]
    own = dataclasses.replace(
        trace,
        events=trace.events[np.isin(trace.events["token"], made["token"])],
        routing=trace.routing[np.isin(trace.routing["token"], made["token"])],
    )
    names = recompute(own, reply=2, phases=[TracePhase.DECODE])
    assert (found.tokens, found.uses, found.hits) == (16, names["uses"], names["hits"])
    assert found.partial_hits == names["partial_hits"]
    assert found.link_bytes == names["demand_bytes"] + names["prefetch_bytes"]
    assert found.stall_s == names["stall_s"]
    assert found.token_s == tuple(made["end_s"] - made["start_s"])
    assert found.tokens_per_s == 1 / np.median(made["end_s"] - made["start_s"])


def test_tokens_of_which_events_are_lost_do_not_count() -> None:
    trace = served(replies=1, tokens=20).trace()
    first = np.flatnonzero(trace.events["kind"] == EventKind.TOKEN)[10]
    late = dataclasses.replace(trace, events=trace.events[first - 2 :], lost_events=int(first) - 2)
    found = tally(late, 1)
    assert found is not None
    assert found.tokens == 10 - WARM_UP  # the one cut in two is the first that is left out
    assert tally(dataclasses.replace(trace, events=trace.events[:0]), 1) is None


# ---- what it means ----


@pytest.mark.parametrize(
    ("speeds", "kind", "better"),
    [
        ([(5, 6), (7, 8), (9, 10)], "helps", None),
        ([(5, 6), (20, 21), (9, 10)], "helps", 1),
        ([(5, 9), (5, 9), (6, 10)], "same", None),
        ([(9, 10), (5, 6), (5, 6)], "slower", 0),
        ([(9, 10), (11, 12), (5, 6)], "slower", 1),
        ([(9.0, 9.01), (5, 6), (8.9, 8.95)], "same", None),  # clear in both passes, but not worth a word
    ],
)
def test_a_verdict_needs_every_pass(speeds: list[tuple[float, ...]], kind: str, better: int | None) -> None:
    rows = [row(f"variant {depth}", *passes, depth=depth) for depth, passes in enumerate(speeds)]
    found = verdict(rows)
    assert (found.kind, found.better) == (kind, better)
    assert ("Fastest was" in found.text) is (better is not None)


def test_the_same_plan_is_not_better_than_itself() -> None:
    found = verdict([row("off", 5, 6, depth=0), row("twin", 20, 21), row("yours", 9, 10)])
    assert (found.kind, found.better) == ("helps", None)


def test_the_table_in_words() -> None:
    measured = Measured(1, "why?", [row("off", 4.0, 6.0, depth=0), row("yours", 10.0, 10.0)])
    told = table(measured)
    assert told["rows"][0] == {
        "name": "off", "speed": "4.8", "range": "4.0 to 6.0", "share": 0.48, "ratio": "1.00 ×", "hits": "50 %",
        "partial": "25 %", "bytes": "100 B", "stall": "50.0 ms",
    }  # fmt: skip
    assert told["rows"][1]["ratio"] == "2.08 ×"
    assert (told["kind"], told["better"]) == ("helps", None)
    assert "2.08 times as fast" in told["verdict"]


# ---- what is asked ----


def conversation(*texts: str) -> Conversation:
    messages = tuple(
        Message(number, number - 1 or None, "user" if number % 2 else "assistant", text, 0.0)
        for number, text in enumerate(texts, start=1)
    )
    return Conversation("a", "t", 0.0, 0.0, 1, {"system": "Be brief."}, len(messages) or None, messages)


def test_what_is_asked() -> None:
    turn = {"role": "user", "content": DEFAULT_QUESTION}
    assert question(None, " ") == ([turn], DEFAULT_QUESTION)
    system = {"role": "system", "content": "Be brief."}
    last = question(conversation("one", "two", "three", "four"), "")
    assert [turn["content"] for turn in last.turns] == ["Be brief.", "one", "two", "three"]
    assert last.words == "three"
    typed = question(conversation("one", "two"), " next ")
    assert [turn["content"] for turn in typed.turns] == ["Be brief.", "one", "two", "next"]
    assert question(conversation(), "").turns == [system, turn]


# ---- jobs ----


def test_a_job_tells_stops_and_survives_what_goes_wrong() -> None:
    job, going, release = Job("moepic-test"), threading.Event(), threading.Event()

    def work(tell: Tell) -> str:
        tell(0.5, "half")
        going.set()
        release.wait(20)
        tell(0.9, "nearly")
        return "done"

    job.start(work)
    assert going.wait(20)
    assert job.view() == {"running": True, "share": 0.5, "text": "half", "error": None}
    with pytest.raises(BadSettings, match="already"):
        job.start(work)
    release.set()
    job.wait()
    assert (job.result, job.view()["error"], job.view()["running"]) == ("done", None, False)
    release.clear()
    job.start(work)
    job.stop()
    release.set()
    job.close()
    assert (job.result, job.view()["error"]) == ("done", "stopped")

    def refuse(tell: Tell) -> None:
        raise BadSettings("no room")

    job.start(refuse)
    job.wait()
    assert job.view()["error"] == "no room"
    job.start(lambda tell: 1 // 0)
    job.wait()
    assert "ZeroDivisionError" in job.view()["error"]


# ---- over a real engine ----


@pytest.fixture(scope="module")
def state(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        folder = checkpoints("qwen3_moe")
        values = {"device": "cpu", "link": "emulated:20MB/s", "vram": "50% of experts", "context_length": 256}
        state = State(Settings.create(checkpoint=str(folder), **values))
        state.load(state.settings)
        state.wait()
        assert state.look().notice is None, state.look().notice
        yield state
        state.close()


def ask(state: State, tokens: int) -> None:
    list(state.reply([{"role": "user", "content": "what?"}], 0.0, 1.0, tokens, lambda: False))


def facts(state: State) -> tuple[Any, ...]:
    """Whatever a comparison must leave alone."""
    look = state.look()
    assert look.snapshot is not None and look.loaded is not None and state.telemetry is not None
    trace = state.telemetry.trace()
    return (
        look.loaded.settings, look.snapshot.plan, look.snapshot.reply, look.snapshot.phase,
        look.snapshot.session.both.total, trace.events.tobytes(), trace.routing.tobytes(),
    )  # fmt: skip


def until_done(helping: Helping) -> dict[str, Any]:
    end_s = time.monotonic() + 60
    while helping.view()["running"]:
        assert time.monotonic() < end_s, helping.view()
        time.sleep(0.01)
    return helping.view()


def test_measuring_leaves_everything_as_it_was(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MOST", 5)
    ask(state, 40)
    state.reconfigure()  # what was just learned goes into the plan
    before, helping = facts(state), Helping(state, Store())
    helping.start("", None)
    told = until_done(helping)
    assert told["error"] is None
    rows = told["table"]["rows"]
    assert [each["name"] for each in rows][:3] == [name for name, _ in LADDER[:3]]
    off, cached = rows[0], rows[1]
    assert (off["hits"], off["partial"], off["ratio"]) == ("0 %", "0 %", "1.00 ×")
    assert cached["hits"] != "0 %"
    assert facts(state) == before
    ask(state, 5)  # and it works on
    helping.close()


def test_a_stop_and_an_error_restore_the_settings_too(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.reconfigure()
    before, helping = facts(state), Helping(state, Store())
    monkeypatch.setattr(comparison, "MOST", 10_000)  # so that it is certainly under way
    monkeypatch.setattr(comparison, "ENOUGH_S", 60.0)
    monkeypatch.setattr("app.helping.DEFAULT_QUESTION", "what?")
    helping.start("", None)
    end_s = time.monotonic() + 30
    while "switched off" not in helping.view()["text"] or not state.comparing:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    with pytest.raises(BadSettings, match="being compared"):
        state.reconfigure(strategy="adapmoe")
    helping.stop()
    assert until_done(helping)["error"] == "stopped"
    assert facts(state) == before
    helping.start("word " * 300, None)
    assert "leaves no room" in until_done(helping)["error"]
    assert facts(state) == before
    helping.close()


@pytest.mark.parametrize("at", [1, 2, 3, 9, 30])
def test_it_can_be_stopped_anywhere(state: State, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(comparison, "MOST", 2)
    state.reconfigure()
    before, calls = facts(state), []

    def tell(share: float, text: str) -> None:
        calls.append(text)
        if len(calls) == at:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        state.compare([{"role": "user", "content": "what?"}], tell)
    assert facts(state) == before
    ask(state, 2)


def test_it_is_refused_while_an_answer_is_written(state: State) -> None:
    answer = state.reply([{"role": "user", "content": "what?"}], 0.0, 1.0, 200, lambda: False)
    next(answer)
    helping = Helping(state, Store())
    helping.start("", None)
    assert (
        until_done(helping)["error"] == "an answer is being written; stop it or wait until it is complete, then compare"
    )
    answer.close()  # type: ignore[attr-defined]
    helping.close()


def test_the_fallback_is_put_in_force(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = [row("on demand", 9.0, 10.0, depth=0, **LADDER[0][1]), row("yours", 5.0, 6.0)]
    monkeypatch.setattr(State, "compare", lambda *_: faster)
    helping = Helping(state, Store())
    with pytest.raises(BadSettings, match="nothing faster"):
        helping.use()
    helping.start("", None)
    told = until_done(helping)["table"]
    assert (told["kind"], told["better"]) == ("slower", "on demand")
    assert helping.use() == "Now in use: on demand."
    loaded = state.look().loaded
    assert loaded is not None
    assert (loaded.settings.strategy, loaded.settings.prefetch) == ("on-demand", "off")
    assert helping.view()["table"] is None
    state.reconfigure(strategy="moepic", prefetch="auto")
    helping.close()
