"""Watches the engine for the page: keeps what its events said lately, the newest sensor readings and the ceiling.

The server makes one and starts it; every request of any tab is answered by `live`. What takes long is done elsewhere:
sensors are read and the ceiling is computed by a thread each, and both end with the server. Reads telemetry only and
changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepic_core.hit_curves import belady_hits
from moepic_core.telemetry import Telemetry
from moepic_core.trace import EVENT, EventKind, TracePhase, used_experts, whole_tokens

from . import gauges, views
from .live import LINK, SHOWN, Ceiling, Heard, see
from .sensors import MachineSource, Repeater, Sample, Sampler, Source
from .state import State
from .terms import CEILING_TOKENS, HISTORY_TOKENS, TRAFFIC_WINDOW_S

CEILING_PERIOD_S = 4.0
INTEREST_S = 10.0  # after the last page that shows panels has asked for them, nothing is computed for them any more
CALM = 100  # while the model answers, the ceiling takes one part in so many of the time


class Watch:
    """See the module. Between `start` and `close` it has two threads; without them it knows only the engine."""

    def __init__(self, state: State, source: Callable[[], Source] = MachineSource) -> None:
        self._state = state
        self._make_source = source
        self._listener = Listener()
        self._lock = threading.Lock()  # around the listener: tabs ask at the same time
        self._ceiling: Ceiling | None = None
        self._ceiling_of = (0, 0)  # loads and version of the snapshot that it is of
        self._asked_s = -INTEREST_S  # when panels were asked for
        self._sampler: Sampler | None = None
        self._repeater: Repeater | None = None

    def start(self) -> None:
        self._sampler = Sampler(self._make_source)
        self._repeater = Repeater("moepic-ceiling", CEILING_PERIOD_S, self._find_ceiling)

    def close(self) -> None:
        for thread in (self._sampler, self._repeater):
            if thread is not None:
                thread.close()

    @property
    def sample(self) -> Sample | None:
        """The newest readings of the sensors; None before the first."""
        return self._sampler.last if self._sampler is not None else None

    def live(self, seen: str = "", panels: bool = True) -> dict[str, Any]:
        """All that moves on the page. A page that has `seen` the present version gets the hardware alone anew.

        Without `panels`, when nobody sees them, it is what the header shows.
        """
        look, ceiling = self._state.look(), self._ceiling
        shown = views.live(look)
        if self._state.comparing:
            shown["status"] = "comparing settings"
        if not panels:
            return shown
        self._asked_s = time.monotonic()
        if ceiling is not None and ceiling.loads != look.loads:
            ceiling = None
        with self._lock:
            heard = self._listener.hear(self._state.telemetry, time.perf_counter())
        answer = {
            **shown,
            "version": f"{look.loads}-{look.snapshot.version if look.snapshot else 0}-{hash(ceiling)}",
            "hardware": gauges.hardware(self.sample, look, heard.link_bytes_per_s),
        }
        return answer if answer["version"] == seen else {**answer, "see": see(look, heard, ceiling)}

    def _find_ceiling(self, closed: threading.Event) -> None:
        if time.monotonic() - self._asked_s > INTEREST_S:
            return
        look, telemetry = self._state.look(), self._state.telemetry
        loaded, snapshot = look.loaded, look.snapshot
        if loaded is None or snapshot is None or telemetry is None:
            return
        if self._state.look().loads != look.loads or self._ceiling_of == (look.loads, snapshot.version):
            return
        counts = [layer.num_experts for layer in loaded.spec.moe_layers]
        rows = whole_tokens(telemetry.trace(), len(counts))[-CEILING_TOKENS:]

        def rest(seconds: float) -> None:
            now = self._state.look().snapshot
            if now is not None and now.phase != "idle":
                closed.wait(seconds)

        number = snapshot.reply.number if snapshot.reply else 0
        self._ceiling = find_ceiling(rows, counts, look.loads, number, rest)
        self._ceiling_of = (look.loads, snapshot.version)


def find_ceiling(
    rows: NDArray[np.void], num_experts: Sequence[int], loads: int, reply: int, rest: Callable[[float], None]
) -> Ceiling:
    """What the best cache would have hit in routing `rows` [tokens, layers] with the slots that each token had.

    `num_experts` per layer. Calls `rest` after each layer with the seconds that it took.
    """
    last, session, uses = [], [], np.zeros(2, int)
    in_reply = rows["reply"][:, 0] == reply  # [tokens]
    for layer, count in enumerate(num_experts):
        start_s = time.perf_counter()
        experts = used_experts(rows[:, layer])  # [tokens, k]
        hits = belady_hits(experts, rows["slots"][:, layer].tolist(), count)  # [tokens, k]
        last.append(_share(hits[in_reply], experts[in_reply]))
        session.append(_share(hits, experts))
        uses += (experts[in_reply] >= 0).sum(), (experts >= 0).sum()
        rest(CALM * (time.perf_counter() - start_s))
    return Ceiling(loads, reply, len(rows), tuple(last), tuple(session), *uses.tolist())


def _share(hits: NDArray[np.bool_], experts: NDArray[np.int16]) -> float | None:
    uses = int((experts >= 0).sum())
    return int(hits.sum()) / uses if uses else None


class Listener:
    """Follows the events of whatever model is loaded. Not locked: its owner does that."""

    def __init__(self) -> None:
        self._moved = np.empty(0, EVENT)  # transfers within the window of the traffic
        self._listen_to(None)

    def hear(self, telemetry: Telemetry | None, now_s: float) -> Heard:
        """What is known now; `now_s` is of the clock of telemetry's events."""
        if telemetry is not self._telemetry:
            self._listen_to(telemetry)
        if telemetry is not None:
            rows, lost = telemetry.events(self._next)
            self._next += lost + len(rows)
            self._take(rows, lost)
        moved = self._moved[self._moved["end_s"] > now_s - TRAFFIC_WINDOW_S]
        self._moved = moved
        return Heard(tuple(self._speeds), self._token, self._events, int(moved["nbytes"].sum()) / TRAFFIC_WINDOW_S)

    def _listen_to(self, telemetry: Telemetry | None) -> None:
        self._telemetry = telemetry
        self._next = 0  # number of the first event not heard yet
        self._speeds: deque[tuple[int, float]] = deque(maxlen=HISTORY_TOKENS)
        self._open = np.empty(0, EVENT)  # events since the last token
        self._is_whole = True  # no event since then is lost
        self._token: np.void | None = None
        self._events: NDArray[np.void] | None = None
        self._moved = self._moved[:0]

    def _take(self, rows: NDArray[np.void], lost: int) -> None:
        self._moved = np.concatenate((self._moved, rows[np.isin(rows["kind"], LINK)]))
        self._open = rows if lost else np.concatenate((self._open, rows))
        self._is_whole = self._is_whole and not lost
        self._add_late()
        ends = np.flatnonzero(self._open["kind"] == EventKind.TOKEN)
        for row in self._open[ends]:
            if row["phase"] == TracePhase.DECODE and row["end_s"] > row["start_s"]:
                self._speeds.append((int(row["reply"]), float(row["end_s"] - row["start_s"])))
        if not len(ends):
            return
        first, last = (ends[-2] + 1 if len(ends) > 1 else 0), ends[-1]
        # Of a pass whose first events are lost, or that read a prompt, there is no timeline.
        if self._open[last]["phase"] == TracePhase.DECODE and (self._is_whole or len(ends) > 1):
            made = self._open[first:last]
            self._token, self._events = self._open[last].copy(), made[np.isin(made["kind"], SHOWN)]
            self._events = self._events[self._events["token"] == self._token["token"]]
        self._open, self._is_whole = self._open[last + 1 :].copy(), True
        self._add_late()

    def _add_late(self) -> None:
        """A transfer of a token may end, and be told of, after it."""
        if self._token is not None and self._events is not None:
            is_late = (self._open["token"] == self._token["token"]) & np.isin(self._open["kind"], SHOWN)
            self._events = np.concatenate((self._events, self._open[is_late]))
            self._open = self._open[~is_late]
