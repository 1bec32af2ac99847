"""How the model answers: system prompt and sampling. The chat reads these with every message; nothing to wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class Answers:
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        """In the order in which `chat` takes them."""
        return [self.system, self.temperature, self.top_p, self.max_new_tokens]


def build() -> Answers:
    with gr.Accordion("Answer settings", elem_id="answers"):
        system = gr.Textbox(
            label="System prompt",
            value="",
            placeholder="None: the model's own manner",
            lines=2,
            max_lines=8,
            elem_id="system",
        )
        with gr.Row():
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", buttons=[], min_width=130)
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", buttons=[], min_width=130)
        max_new_tokens = gr.Slider(16, 4096, 512, step=16, label="Longest answer (tokens)", buttons=[])
    return Answers(system, temperature, top_p, max_new_tokens)
