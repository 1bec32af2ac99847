"""The conversation: a streaming chat with stop, retry, undo and edit. It lives in the page and ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from moepic_core.errors import MoepicError

from .. import conversation
from ..state import State
from .answers import Answers

PLACEHOLDER = "### Ask anything\nThe model runs on this machine. Nothing leaves it."
EXAMPLES = [
    ["What does a router do in a Mixture-of-Experts model?"],
    ["Write a limerick about waiting for memory."],
    ["Explain caching to a ten-year-old."],
]


def build(answers: Answers, state: State) -> gr.Textbox:
    """The chat. `answers` must be on the page already, or Gradio would put them below the chat."""

    def answer(
        message: str, history: list[dict[str, Any]], system: str, temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        state.clear_notice()
        try:
            turns = conversation.messages(system, history, message)
            yield from state.reply(turns, temperature, top_p, int(max_new_tokens))
        except MoepicError as error:
            state.tell("error", str(error))

    chatbot = gr.Chatbot(
        label="Conversation",
        show_label=False,
        layout="bubble",
        buttons=["copy"],
        height="100%",
        placeholder=PLACEHOLDER,
        feedback_options=None,
        allow_tags=False,
        reasoning_tags=[("<think>", "</think>")],
        elem_id="conversation",
    )
    message = gr.Textbox(
        label="Message",
        placeholder="Message the model",
        container=False,
        lines=1,
        max_lines=6,
        autofocus=True,
        submit_btn=True,
        stop_btn=True,
        html_attributes=gr.InputHTMLAttributes(spellcheck=True),
        elem_id="message",
    )
    gr.ChatInterface(
        answer,
        chatbot=chatbot,
        textbox=message,
        examples=EXAMPLES,
        editable=True,
        additional_inputs=answers.inputs,
        show_progress="hidden",
        concurrency_limit=1,
        api_visibility="private",
        fill_height=False,
    )
    return message


def wire(message: gr.Textbox, state: State) -> None:
    # Gradio closes the running iterator too, but only once it yields; this reaches the engine at once.
    message.stop(state.stop, None, None, queue=False, api_visibility="private")
