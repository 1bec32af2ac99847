"""The chat: asking, streaming answers with stop, and everything that is done with messages afterwards.

`talk` does all of it; here its views become what Gradio shows, and Gradio's events become calls. Gradio's way to cancel
an event now and then ends in an error, so a stop is a flag that the answer looks at, and every answer ends by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from moepic_core.extras import suggested_prompts

from .. import sampling
from ..talk import Talk, View, opened_id
from . import answers as answers_panel
from .answers import DEFAULTS, Answers

PLACEHOLDER = "### Ask anything\nThe model runs on this machine. Nothing leaves it."
EXAMPLES = (
    "What does a router do in a Mixture-of-Experts model?",
    "Write a limerick about waiting for memory.",
    "Explain caching to a ten-year-old.",
)
FORMULAS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))


@dataclass(frozen=True)
class Chat:
    history: gr.Chatbot
    message: gr.Textbox


def build() -> Chat:
    history = gr.Chatbot(
        label="Conversation",
        show_label=False,
        layout="bubble",
        buttons=["copy"],
        editable="user",
        height="100%",
        placeholder=PLACEHOLDER,
        examples=[{"text": example} for example in EXAMPLES],
        feedback_options=None,
        allow_tags=False,
        latex_delimiters=[{"left": left, "right": right, "display": display} for left, right, display in FORMULAS],
        elem_id="conversation",
    )
    message = gr.Textbox(
        label="Message",
        show_label=False,
        placeholder="Message the model",
        container=False,
        lines=1,
        max_lines=6,
        autofocus=True,
        submit_btn=True,
        html_attributes=gr.InputHTMLAttributes(spellcheck=True),
        elem_id="message",
    )
    return Chat(history, message)


@dataclass(frozen=True)
class Handlers:
    """What the chat's events do: views of `talk` as Gradio takes them."""

    talk: Talk
    answers: Answers

    def send(self, text: str, open_: str, *values: Any) -> tuple[Any, ...]:
        return self.talk.send(text, open_, answers_panel.settings(*values))

    def send_example(self, open_: str, event: gr.SelectData, *values: Any) -> tuple[Any, ...]:
        return self.talk.send(str(event.value["text"]), open_, answers_panel.settings(*values))[1:]

    def edit(self, open_: str, event: gr.EditData) -> View:
        index = event.index[0] if isinstance(event.index, list | tuple) else event.index
        return self.talk.edit(open_, index, str(event.value))

    def answer(self, stop: threading.Event, open_: str, *values: Any) -> Iterator[list[Any]]:
        for window, beside in self.talk.answer(open_, answers_panel.settings(*values), stop):
            yield [window, gr.skip() if beside is None else beside]

    def go_on(self, stop: threading.Event, open_: str, *values: Any) -> Iterator[list[Any]]:
        for window, beside in self.talk.go_on(open_, answers_panel.settings(*values), stop):
            yield [window, gr.skip() if beside is None else beside]

    def choose(self, event: gr.EventData) -> list[Any]:
        """The panel beside wants another conversation, branch or version, or what this one has become meanwhile."""
        wanted = event._data if isinstance(event._data, dict) else {}
        id = self.talk.choose(wanted.get("id"), wanted.get("number"), wanted.get("branch") is True)
        question = wanted.get("question")
        view = self.talk.view(id, question if isinstance(question, int) else 0)
        if wanted.get("same") is True:
            return [*view, *[gr.skip()] * len(self.answers.outputs)]
        found = self.talk.store.get(id)
        return [*view, *(self._begun() if found is None else answers_panel.shown(found.settings))]

    def _begun(self) -> list[Any]:
        """A new chat leaves system prompt and seed as they are."""
        values = dict(zip(DEFAULTS, answers_panel.shown(sampling.chosen(self.talk.state))[1:], strict=True))
        preset = answers_panel.preset_of(values)
        return [preset, *(value if name in sampling.DEFAULTS else gr.skip() for name, value in values.items())]

    def suggest(self, open_: str) -> list[Any]:
        """Another model is there: its prompts, and its sampling where no conversation is open."""
        loaded = self.talk.state.look().loaded
        suggested = suggested_prompts(Path(loaded.spec.path)) if loaded else ()
        examples = gr.Chatbot(examples=[{"text": text} for text in suggested or EXAMPLES])
        return [examples, *([gr.skip()] * len(self.answers.outputs) if opened_id(open_) else self._begun())]


def wire(chat: Chat, open_: gr.HTML, answers: Answers, page: gr.Blocks, refresh: gr.Button, talk: Talk) -> None:
    does = Handlers(talk, answers)
    stop = gr.State(None)  # threading.Event | None: of the answer that this tab waits for
    window = [chat.history, open_]
    inputs = [open_, *answers.inputs]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    slow: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    asked = [
        chat.message.submit(does.send, [chat.message, *inputs], [chat.message, *window], **quiet),
        chat.history.example_select(does.send_example, inputs, window, **quiet),
        chat.history.retry(talk.retry, open_, window, **quiet),
        chat.history.edit(does.edit, open_, window, **quiet),
    ]
    running = [
        *(event.then(_busy, None, [chat.message, stop], **quiet).then(does.answer, [stop, *inputs], window, **slow)
          for event in asked),
        open_.submit(_busy, None, [chat.message, stop], **quiet).then(does.go_on, [stop, *inputs], window, **slow),
    ]  # fmt: skip
    for event in running:
        event.then(_ready, None, chat.message, **quiet)
    chat.message.stop(threading.Event.set, stop, None, **quiet)
    chat.history.undo(talk.undo, open_, [chat.message, *window], **quiet)
    open_.select(does.choose, None, [*window, *answers.outputs], **quiet)
    gr.on([page.load, refresh.click], does.suggest, open_, [chat.history, *answers.outputs], **quiet)


def _busy() -> tuple[gr.Textbox, threading.Event]:
    return gr.Textbox(submit_btn=False, stop_btn=True), threading.Event()


def _ready() -> gr.Textbox:
    return gr.Textbox(submit_btn=True, stop_btn=False)
