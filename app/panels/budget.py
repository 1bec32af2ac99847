"""The memory budget: one slider in GB, what it is made of, and what it buys. Works while the model answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.errors import MoepicError

from .. import views
from ..nouns import Preview
from ..state import State


@dataclass(frozen=True)
class Budget:
    slider: gr.Slider
    bar: gr.HTML

    def show(self, preview: Preview | None) -> list[Any]:
        """Values for slider and bar."""
        numbers = views.budget_range(preview) if preview is not None else None
        if preview is None or numbers is None or preview.budget_bytes is None:
            return [gr.Slider(interactive=False), "null"]
        slider = gr.Slider(
            minimum=numbers.minimum,
            maximum=numbers.maximum,
            step=numbers.step,
            value=numbers.value,
            interactive=True,
        )
        in_use = preview.budget_bytes if preview.loaded else None
        return [slider, json.dumps(views.budget_card(preview, preview.budget_bytes, in_use))]


def build(memory: str) -> Budget:
    with gr.Column(elem_id="budget"):
        slider = gr.Slider(0, 1, 0, label=f"{memory} budget (GB)", interactive=False, buttons=[], elem_id="slider")
        bar = gr.HTML("null", html_template='<div class="memory"></div>', apply_default_css=False,
                      js_on_load="MoEpic.memory(element, props, watch)", elem_id="bar")  # fmt: skip
    return Budget(slider, bar)


def wanted_bytes(preview: Preview, gigabytes: float) -> int:
    """The budget that the slider asks for: its ends are rounded, the budget is not."""
    assert preview.needs is not None, preview.settings.checkpoint
    return min(max(views.to_bytes(gigabytes), preview.needs.smallest), preview.needs.everything)


def wanted_vram(preview: Preview, gigabytes: float) -> str | int:
    """The same as a setting. The end of the slider means everything, also when loading finds a little more."""
    assert preview.needs is not None, preview.settings.checkpoint
    budget = wanted_bytes(preview, gigabytes)
    return "100%" if budget == preview.needs.everything else budget


def wire(budget: Budget, selection: gr.State, state: State) -> None:
    def slide(preview: Preview | None, gigabytes: float) -> str:
        """While the slider moves: what this budget would buy."""
        if preview is None or preview.budget_bytes is None:
            return "null"
        snapshot = state.look().snapshot
        # Asked anew because this can be answered after the slider was released and `apply` is done.
        in_use = snapshot.plan.memory.budget if preview.loaded and snapshot and snapshot.plan else None
        return json.dumps(views.budget_card(preview, wanted_bytes(preview, gigabytes), in_use))

    def apply(preview: Preview | None, gigabytes: float) -> tuple[Preview | None, str]:
        """When it is released: the loaded model gets the budget at its next token."""
        if preview is None or not preview.loaded:
            return preview, slide(preview, gigabytes)
        try:
            state.clear_notice()
            state.reconfigure(vram=wanted_vram(preview, gigabytes))
            preview = state.preview(preview.settings)
        except MoepicError as error:
            state.tell("error", str(error))
        return preview, budget.show(preview)[1]

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    budget.slider.input(slide, [selection, budget.slider], budget.bar, trigger_mode="always_last", **quiet)
    budget.slider.release(apply, [selection, budget.slider], [selection, budget.bar], **quiet)
