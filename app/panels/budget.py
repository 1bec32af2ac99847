"""The memory budget: one slider in GB or MB, what it is made of, and what it buys. Works while the model answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.spec import DeviceKind

from .. import cards
from ..nouns import Preview


@dataclass(frozen=True)
class Budget:
    slider: gr.Slider
    bar: gr.HTML


def build(device: DeviceKind) -> Budget:
    with gr.Column(elem_id="budget"):
        slider = gr.Slider(0, 1, 0, label=_label(device, "GB"), interactive=False, buttons=[], elem_id="slider")
        bar = gr.HTML("null", html_template='<div class="memory"></div>', apply_default_css=False,
                      js_on_load="MoEpic.memory(element, props, watch)", elem_id="bar")  # fmt: skip
    return Budget(slider, bar)


def shown(preview: Preview | None) -> list[Any]:
    """Values for slider and bar. What will not run is shown with the smallest budget, to see what it is made of."""
    numbers = cards.budget_range(preview) if preview is not None else None
    if preview is None or preview.needs is None:
        return [gr.Slider(interactive=False), "null"]
    if numbers is None or preview.budget_bytes is None:
        return [gr.Slider(interactive=False), json.dumps(cards.budget_card(preview, preview.needs.smallest, None))]
    slider = gr.Slider(
        minimum=numbers.minimum, maximum=numbers.maximum, step=numbers.step, value=numbers.value, interactive=True,
        label=_label(preview.machine.device, numbers.unit),
    )  # fmt: skip
    in_use = preview.budget_bytes if preview.loaded else None
    return [slider, json.dumps(cards.budget_card(preview, preview.budget_bytes, in_use))]


def _label(device: DeviceKind, unit: str) -> str:
    return f"{cards.memory_of(device)} budget ({unit})"


def wanted_bytes(preview: Preview, value: float) -> int:
    """The budget that the slider asks for with `value`: its ends are rounded, the budget is not."""
    numbers = cards.budget_range(preview)
    assert preview.needs is not None and numbers is not None, preview.settings.checkpoint
    return min(max(numbers.to_bytes(value), preview.needs.smallest), preview.needs.everything)


def wanted_vram(preview: Preview, value: float) -> str | int:
    """The same as a setting: the one that holds while the slider stands where it was put.

    The end of the slider means everything, also when loading finds a little more.
    """
    assert preview.needs is not None, preview.settings.checkpoint
    numbers = cards.budget_range(preview)
    if numbers is not None and value == numbers.value:
        return preview.settings.vram
    budget = wanted_bytes(preview, value)
    return "100%" if budget == preview.needs.everything else budget
