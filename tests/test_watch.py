"""What is kept between two requests of the page: events heard in any instalments, the ceiling, and threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_live import served

from app.sensors import Sample
from app.state import State
from app.terms import HISTORY_TOKENS, TRAFFIC_WINDOW_S
from app.watch import Listener, Watch
from moepic_core.spec import Settings
from moepic_core.telemetry import EventKind, Part, Telemetry


class Session:
    """A telemetry of which a reader sees only the first `shown` events."""

    def __init__(self, full: Telemetry) -> None:
        self.rows, _ = full.events()
        self.shown = 0

    def events(self, since: int) -> tuple[np.ndarray, int]:
        return self.rows[since : self.shown], 0


FULL = served(replies=3, tokens=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=20))
def test_instalments_change_nothing(steps: list[int]) -> None:
    session, listener = Session(FULL), Listener()
    for step in steps:
        session.shown = min(session.shown + step, len(session.rows))
        listener.hear(session, 0.0)  # type: ignore[arg-type]
    session.shown = len(session.rows)
    heard, at_once = listener.hear(session, 0.0), Listener().hear(FULL, 0.0)  # type: ignore[arg-type]
    assert heard.speeds == at_once.speeds
    assert len(heard.speeds) == 18
    assert heard.token == at_once.token
    np.testing.assert_array_equal(heard.events, at_once.events)
    assert heard.link_bytes_per_s == at_once.link_bytes_per_s


def token(telemetry: Telemetry, number: int, now_s: float, num_events: int) -> None:
    for _ in range(num_events):
        telemetry.event(EventKind.DEMAND, 0, 1, Part.WHOLE, now_s - 0.5, now_s - 0.25, 100, number)
    telemetry.new_token(number, now_s)


def test_a_pass_of_which_events_are_lost_has_no_timeline() -> None:
    telemetry, listener = Telemetry(1, 4, 1, event_capacity=8), Listener()
    telemetry.begin_reply(0.0, 1, 0)
    token(telemetry, 0, 1.0, 1)
    assert listener.hear(telemetry, 1.0).token is None  # it read the prompt
    token(telemetry, 1, 2.0, 3)
    heard = listener.hear(telemetry, 2.0)
    assert heard.token is not None
    assert (heard.token["token"], len(heard.events if heard.events is not None else [])) == (1, 3)
    token(telemetry, 2, 3.0, 20)
    lost = listener.hear(telemetry, 3.0)
    assert lost.token == heard.token
    assert [seconds for _, seconds in lost.speeds] == [1.0, 1.0]
    token(telemetry, 3, 4.0, 2)
    after = listener.hear(telemetry, 4.0)
    assert after.token is not None
    assert (after.token["token"], len(after.events if after.events is not None else [])) == (3, 2)


def test_history_is_bounded_and_a_new_model_begins_a_new_one() -> None:
    listener, first, second = Listener(), Telemetry(1, 4, 1), Telemetry(1, 4, 1)
    first.begin_reply(0.0, 1, 0)
    for number in range(HISTORY_TOKENS + 50):
        first.new_token(number, float(number))
    assert len(listener.hear(first, 0.0).speeds) == HISTORY_TOKENS
    assert listener.hear(second, 0.0).speeds == ()
    assert listener.hear(None, 0.0).token is None


def test_traffic_is_what_ended_within_the_window() -> None:
    listener, telemetry = Listener(), Telemetry(1, 4, 1)
    for end_s, kind in ((1.0, EventKind.DEMAND), (2.5, EventKind.PREFETCH), (2.6, EventKind.USED)):
        telemetry.event(kind, 0, 1, Part.WHOLE, 0.5, end_s, 100, 0)
    rates = [listener.hear(telemetry, now_s).link_bytes_per_s for now_s in (2.6, 3.5, 5.0)]
    assert rates == [200 / TRAFFIC_WINDOW_S, 100 / TRAFFIC_WINDOW_S, 0.0]


class Quiet:
    def read(self) -> Sample:
        return Sample(cpu_use=0.25)

    def close(self) -> None:
        pass


def test_over_a_real_engine(checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.watch.CEILING_PERIOD_S", 0.05)
    folder = checkpoints("qwen3_moe")
    state = State(Settings.create(checkpoint=str(folder), device="cpu", link="emulated:50MB/s", context_length=256))
    watch = Watch(state, Quiet)
    assert watch.live()["see"]["layers"] is None
    assert watch.live()["hardware"]["meters"]["cpu"]["share"] is None  # not started
    watch.start()
    try:
        state.load(state.settings)
        state.wait()
        list(state.reply([{"role": "user", "content": "what?"}], 0.0, 1.0, 12, lambda: False))
        until(watch, lambda _: watch._ceiling is not None and watch._ceiling.num_tokens == 11)
        answer = watch.live()  # the one before may be older than the ceiling
        shown, telemetry = answer["see"], state.telemetry
        assert telemetry is not None
        events = telemetry.trace().events
        assert len(shown["speed"]["rates"]) == 11
        assert shown["token"]["seconds"] == np.ptp(events[events["kind"] == EventKind.TOKEN]["end_s"][-2:])
        assert all(0 <= share <= 1 for share in shown["layers"]["session"]["ceiling"])
        assert shown["layers"]["session"]["ceiling"] == shown["layers"]["last"]["ceiling"]
        assert answer["hardware"]["meters"]["cpu"]["share"] == 0.25
        again = watch.live(answer["version"])
        assert "see" not in again
        assert again["version"] == answer["version"]
        state.reconfigure(vram=state.look().loaded.needs.smallest)  # type: ignore[union-attr]
        assert watch.live(answer["version"])["see"]["layers"]["slots"] == [0, 0, 0]
    finally:
        watch.close()
        state.close()
    assert watch.live()["see"]["layers"] is None
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("moepic")]


def until(watch: Watch, wanted: Callable[[dict], bool]) -> dict:
    deadline = time.monotonic() + 20
    while not wanted(answer := watch.live()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)
    return answer
