"""What can be done with a conversation: ask, answer, go on, ask again, take back, edit, choose a version.

The store is the one place where a conversation lives; each method changes it first and then returns the view of it:
what the window shows (see `conversation.shown`) and, as JSON, what the panel beside knows. An answer is written down
twice a second while it grows, so that a closed tab or a killed process costs no more than that. Knows no Gradio.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moepic_core.errors import MoepicError

from . import conversation, sampling
from .conversation import Message
from .nouns import Answer
from .state import State
from .store import Store

SAVE_S = 0.5  # between two times that a growing answer is written down
DRAW_S = 0.0005  # for each message above: browsers look at all of them whenever one grows, and shall have time for more

Window = list[dict[str, Any]]
View = tuple[Window, str]


class Talk:
    """What can be done with conversations. `open_` is the value of the panel beside, of which the id counts here."""

    def __init__(self, store: Store, state: State) -> None:
        self.store = store
        self.state = state
        self.growing: set[tuple[str, int]] = set()  # (conversation, message) of answers that are being made

    def view(self, id: str | None, question: int = 0) -> View:
        """The window and the panel beside for conversation `id`; None, or one that is gone, is a new chat.

        `question` is the number of the panel's request that this answers, 0 when it asked for nothing.
        """
        found = self.store.get(id)
        if found is None:
            return [], _json({"id": None, "changed": 0, "rows": [], "question": question})
        rows = conversation.rows(found)
        for row in rows:
            if (found.id, row["number"]) in self.growing:
                row |= {"note": "being written", "continues": False}
        beside = {"id": found.id, "changed": found.changed, "rows": rows, "question": question}
        return conversation.shown(found.path), _json(beside)

    def send(self, text: str, open_: str, settings: dict[str, Any]) -> tuple[str, Window, str]:
        """Writes a question down. What to write in is empty then."""
        id = opened_id(open_)
        found = self.store.get(id)
        if not text.strip() or (found is not None and (found.id, found.leaf) in self.growing):
            return (text, *self.view(id))
        loaded = self.state.look().loaded
        settings = {**settings, "checkpoint": loaded.settings.checkpoint if loaded else None}
        if found is None:
            sampling.keep(self.state, settings)
            id, parent = self.store.create(settings), None
        else:
            id, parent = found.id, found.leaf
            self.store.configure(id, settings)
        self.store.add(id, "user", text, parent)
        return ("", *self.view(id))

    def retry(self, open_: str) -> View:
        """Back to the last question, whose answers stay as other versions."""
        found = self.store.get(opened_id(open_))
        if found is not None and found.path and found.path[-1].role == "assistant":
            self.store.open_branch(found.id, found.path[-1].parent)
        return self.view(opened_id(open_))

    def undo(self, open_: str) -> tuple[str, Window, str]:
        """Back to before the last question, which goes to where it was written."""
        found = self.store.get(opened_id(open_))
        asked = [message for message in found.path if message.role == "user"] if found else []
        if found is None or not asked:
            return ("", *self.view(opened_id(open_)))
        self.store.open_branch(found.id, asked[-1].parent)
        return (asked[-1].text, *self.view(found.id))

    def edit(self, open_: str, index: int, text: str) -> View:
        """Another version of the question at `index` of the window, if it is another one."""
        found = self.store.get(opened_id(open_))
        edited = conversation.owner(found.path, index) if found else None
        if found is not None and edited is not None and edited.role == "user" and text.strip() not in ("", edited.text):
            self.store.add(found.id, "user", text, edited.parent)
        return self.view(opened_id(open_))

    def choose(self, id: Any, number: Any, branch: bool) -> str | None:
        """Which conversation to show when a page asks for `id`, perhaps for message `number` in it.

        With a number, that version becomes the open one, or a new conversation branches off there. What a page asks for
        comes from outside, so it may be anything.
        """
        found = self.store.get(id) if isinstance(id, str) else None
        if found is None:
            return None
        if number not in [message.number for message in found.messages]:
            return found.id
        if branch:
            return self.store.branch(found.id, number)
        self.store.open_branch(found.id, found.newest_leaf(number))
        return found.id

    def answer(
        self, open_: str, settings: dict[str, Any], stop: threading.Event
    ) -> Iterator[tuple[Window, str | None]]:
        """Answers the last question: views of it, None where the panel stays as it is. Nothing when there is none."""
        found = self.store.get(opened_id(open_))
        if found is None or not found.path or found.path[-1].role != "user":
            return
        number = self.store.add(found.id, "assistant", "", found.leaf, "")
        yield from self._grow(found.id, number, found.path, "", settings, stop)

    def go_on(self, open_: str, settings: dict[str, Any], stop: threading.Event) -> Iterator[tuple[Window, str | None]]:
        """Continues the last answer."""
        found = self.store.get(opened_id(open_))
        if found is None or not found.path or (found.id, found.path[-1].number) in self.growing:
            return
        *before, last = found.path
        if last.role == "assistant":
            yield from self._grow(found.id, last.number, before, last.text.rstrip(), settings, stop)

    def _grow(
        self,
        id: str,
        number: int,
        before: Sequence[Message],
        begun: str,
        settings: dict[str, Any],
        stop: threading.Event,
    ) -> Iterator[tuple[Window, str | None]]:
        """Lets message `number` grow from `begun`. It is closed when the user leaves."""
        shown = conversation.shown(before)
        message = Message(number, None, "assistant", begun, time.time(), "")
        turns = conversation.messages(str(settings["system"]), [*before, message])
        text, reason, figures = begun, "", {}
        self.growing.add((id, number))
        self.state.clear_notice()
        try:
            saved_s = drawn_s = time.monotonic()
            values = {name: value for name, value in settings.items() if name != "system"}
            for answer in self.state.reply(turns, **values, stopped=stop.is_set):
                text, reason, figures = begun + answer.text, answer.reason or "", _figures(answer)
                if time.monotonic() - drawn_s >= DRAW_S * len(shown):
                    drawn_s = time.monotonic()
                    now = Message(number, None, "assistant", text, message.created, "")
                    yield [*shown, *(conversation.shown([now]) if text else [_waiting(answer)])], None
                if time.monotonic() - saved_s > SAVE_S:
                    self.store.save(id, number, text, "")
                    saved_s = time.monotonic()
        except MoepicError as error:
            reason, figures = "error", {"error": str(error)}
            self.state.tell("error", str(error))
        finally:
            self.growing.discard((id, number))
            self.store.save(id, number, text, reason, figures)
        yield self.view(id)


def _json(value: Any) -> str:
    """In which nothing looks like HTML, wherever it is put."""
    return json.dumps(value).replace("<", "\\u003c")


def _waiting(answer: Answer) -> dict[str, Any]:
    if answer.waits:
        return conversation.waiting(f"Waiting for {answer.waits}")
    if not answer.prompt_tokens:
        return conversation.waiting("Reading the prompt")
    return conversation.waiting(f"Reading the prompt: {answer.read_tokens} of {answer.prompt_tokens} tokens")


def _figures(answer: Answer) -> dict[str, Any]:
    if answer.figures is None:
        return {}
    names = ("tokens_per_s", "ttft_s", "new_tokens", "prompt_tokens")
    return {name: getattr(answer.figures, name) for name in names}


def opened_id(open_: str) -> str | None:
    """Which conversation a page has open: what it says comes from outside."""
    try:
        found = json.loads(open_)
    except ValueError:
        return None
    id = found.get("id") if isinstance(found, dict) else None
    return id if isinstance(id, str) else None
