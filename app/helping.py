"""Is it helping? Measures one prompt with parts switched off and on, and says in words and numbers what came of it.

The explore panel starts and stops it through `explore_routes`. The engine's part is `State.compare`, what is tried and
what the table means is `moepic_core.ablation`; here are the question that is asked, the thread, and the table as JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from moepic_core.ablation import Row, verdict
from moepic_core.errors import BadSettings
from moepic_core.units import format_bytes

from . import conversation
from .conversation import Conversation, Message
from .jobs import Job, Tell
from .state import State
from .store import Store
from .views import milliseconds, percent

DEFAULT_QUESTION = "What does a router do in a Mixture-of-Experts model?"


class Question(NamedTuple):
    turns: list[dict[str, str]]  # as the model reads them
    words: str  # for people


class Measured(NamedTuple):
    loads: int  # of the model that was measured, as in Look
    words: str
    rows: list[Row]


def question(found: Conversation | None, text: str) -> Question:
    """What is written in the message field, behind the open conversation; or its last question; or a default one."""
    path: Sequence[Message] = found.path if found else ()
    system = str(found.settings.get("system", "")) if found else ""
    if text.strip():
        path = [*path, Message(0, None, "user", text.strip(), 0.0)]
    asked = [place for place, message in enumerate(path) if message.role == "user"]
    if not asked:
        path, asked = [Message(0, None, "user", DEFAULT_QUESTION, 0.0)], [0]
    path = path[: asked[-1] + 1]
    return Question(conversation.messages(system, path), conversation.title_of(path[-1].text))


class Helping:
    """See the module. One comparison at a time, for all tabs."""

    def __init__(self, state: State, store: Store) -> None:
        self._state = state
        self._store = store
        self._job = Job("moepic-compare")

    @property
    def measured(self) -> Measured | None:
        """The newest table, if it is of the model that is loaded now."""
        found: Measured | None = self._job.result
        return found if found is not None and found.loads == self._state.look().loads else None

    def start(self, text: str, id: str | None) -> None:
        """Measures what is written in the message field, `text`, or else in conversation `id`. Raises BadSettings."""
        asked = question(self._store.get(id), text)
        loads = self._state.look().loads

        def work(tell: Tell) -> Measured:
            started_s = time.monotonic()

            def say(share: float, name: str) -> None:
                left_s = (time.monotonic() - started_s) * (1 - share) / share if share > 0.1 else None
                tell(share, name if left_s is None else f"{name} · about {max(1, round(left_s))} s left")

            return Measured(loads, asked.words, self._state.compare(asked.turns, say))

        self._job.start(work)

    def stop(self) -> None:
        if self._job.view()["running"]:
            self._job.stop()
            self._state.stop()

    def close(self) -> None:
        self.stop()
        self._job.close()

    def use(self) -> str:
        """Changes the present settings to the ones that were clearly faster; says what was done."""
        found = self.measured
        better = verdict(found.rows).better if found is not None else None
        if found is None or better is None:
            raise BadSettings("nothing faster than the present settings was measured; measure again")
        variant = found.rows[better].variant
        adopt(self._state, variant.changes)
        self._job.result = None  # it was about other settings
        return f"Now in use: {variant.name}."

    def view(self) -> dict[str, Any]:
        found = self.measured
        return {**self._job.view(), "table": None if found is None else table(found)}


def adopt(state: State, changes: dict[str, Any]) -> None:
    """Puts `changes` of live settings in force and keeps them with the checkpoint. Raises a MoepicError."""
    state.reconfigure(**changes)
    loaded = state.look().loaded
    if loaded is not None:
        state.kept.keep(loaded.settings.checkpoint, **changes)


def table(measured: Measured) -> dict[str, Any]:
    """Rows and verdict in words; the last row is that of the present settings."""
    rows, said = measured.rows, verdict(measured.rows)
    most = max(row.total.tokens_per_s for row in rows)
    return {
        "question": measured.words,
        "rows": [_row(row, rows[0], most) for row in rows],
        "verdict": said.text,
        "kind": said.kind,
        "better": None if said.better is None else rows[said.better].variant.name,
        "tokens": f"{len(rows[0].passes)} passes of {rows[0].passes[0].tokens} tokens, in different orders",
    }


def _row(row: Row, off: Row, most: float) -> dict[str, Any]:
    total = row.total
    speeds = [tally.tokens_per_s for tally in row.passes]
    return {
        "name": row.variant.name,
        "speed": f"{total.tokens_per_s:.1f}",
        "range": f"{min(speeds):.1f} to {max(speeds):.1f}",
        "share": round(total.tokens_per_s / most, 4),
        "ratio": f"{total.tokens_per_s / off.total.tokens_per_s:.2f} ×",
        "hits": percent(total.hits / total.uses if total.uses else None),
        "partial": percent(total.partial_hits / total.uses if total.uses else None),
        "bytes": format_bytes(round(total.link_bytes / total.tokens)),
        "stall": milliseconds(total.stall_s / total.tokens),
    }
