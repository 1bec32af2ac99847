"""The conversation: streaming answers with stop, retry, undo and edit. It lives in the page and ends with it.

Gradio's own `ChatInterface` keeps the history three times and writes one copy back into the window a little later, and
what was asked in between is lost; here the window itself is the one place. Gradio's way to cancel an event now and then
ends in an error, so a stop is a flag that the answer looks at, and every answer ends by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.errors import MoepicError

from .. import conversation
from ..state import State
from .answers import Answers

PLACEHOLDER = "### Ask anything\nThe model runs on this machine. Nothing leaves it."
EXAMPLES = (
    "What does a router do in a Mixture-of-Experts model?",
    "Write a limerick about waiting for memory.",
    "Explain caching to a ten-year-old.",
)

History = list[dict[str, Any]]


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
        reasoning_tags=[("<think>", "</think>")],
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


def wire(chat: Chat, answers: Answers, state: State) -> None:
    stop = gr.State(None)  # threading.Event | None: of the answer that this tab waits for

    def answer(
        history: History, stop: threading.Event, system: str, temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[History]:
        """Answers the last message of the user. Gradio closes this when the user leaves."""
        if not history or history[-1]["role"] != "user":
            return
        state.clear_notice()
        try:
            turns = conversation.messages(system, history)
            for text in state.reply(turns, temperature, top_p, int(max_new_tokens), stop.is_set):
                yield [*history, _message("assistant", text)] if text else history
        except MoepicError as error:
            state.tell("error", str(error))

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    asked = [
        chat.message.submit(send, [chat.message, chat.history], [chat.message, chat.history], **quiet),
        chat.history.example_select(send_example, chat.history, chat.history, **quiet),
        chat.history.retry(retry, chat.history, chat.history, **quiet),
        chat.history.edit(edit, chat.history, chat.history, **quiet),
    ]
    running = [
        event.then(_busy, None, [chat.message, stop], **quiet).then(
            answer,
            [chat.history, stop, *answers.inputs],
            chat.history,
            show_progress="hidden",
            concurrency_id="engine",
            concurrency_limit=1,
            api_visibility="private",
        )
        for event in asked
    ]
    for event in running:
        event.then(_ready, None, chat.message, **quiet)
    chat.message.stop(threading.Event.set, stop, None, **quiet)
    chat.history.undo(undo, chat.history, [chat.message, chat.history], **quiet)


def send(text: str, history: History) -> tuple[str, History]:
    return ("", [*history, _message("user", text)]) if text.strip() else (text, history)


def send_example(history: History, event: gr.SelectData) -> History:
    return [*history, _message("user", event.value["text"])]


def retry(history: History) -> History:
    """Without what came after the last message of the user."""
    return history[: _last_question(history) + 1]


def undo(history: History) -> tuple[str, History]:
    """The last message of the user goes back to where it was written."""
    last = _last_question(history)
    return (conversation.text_of(history[last]), history[:last]) if last >= 0 else ("", history)


def edit(history: History, event: gr.EditData) -> History:
    index = event.index[0] if isinstance(event.index, list | tuple) else event.index
    return [*history[:index], _message("user", event.value)]


def _last_question(history: History) -> int:
    """Position of the last message of the user, -1 when there is none."""
    return max((place for place, entry in enumerate(history) if entry["role"] == "user"), default=-1)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _busy() -> tuple[gr.Textbox, threading.Event]:
    return gr.Textbox(submit_btn=False, stop_btn=True, interactive=False), threading.Event()


def _ready() -> gr.Textbox:
    return gr.Textbox(submit_btn=True, stop_btn=False, interactive=True)
