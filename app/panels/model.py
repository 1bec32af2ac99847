"""The choice of a model: which checkpoint, over which link, by which strategy; whether it runs here; loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.errors import BadSettings, MoepicError
from moepic_core.links import PRESETS_BYTES_PER_S
from moepic_core.spec import STRATEGIES, DeviceKind, Settings
from moepic_core.units import format_bytes

from .. import checkpoints, views
from ..nouns import Preview
from ..state import State, is_same_model
from .budget import Budget, wanted_vram


@dataclass(frozen=True)
class Model:
    checkpoint: gr.Dropdown
    link: gr.Dropdown
    strategy: gr.Dropdown
    context: gr.Number
    card: gr.HTML
    load: gr.Button
    cancel: gr.Button
    refresh: gr.Button  # never seen: the page's script presses it when a model has come or gone
    selection: gr.State  # Preview | None: what the picker points at

    @property
    def choices(self) -> list[gr.components.Component]:
        return [self.checkpoint, self.link, self.strategy, self.context]


def build(device: DeviceKind) -> Model:
    with gr.Column(elem_id="model"):
        with gr.Row(elem_id="picker"):
            checkpoint = gr.Dropdown(
                [],
                label="Checkpoint (pick one, or type a folder or a hub id)",
                allow_custom_value=True,
                scale=4,
                elem_id="checkpoint",
            )
            load = gr.Button("Load", variant="primary", scale=1, min_width=88, elem_id="load")
            cancel = gr.Button("Cancel", scale=1, min_width=88, elem_id="cancel")
        card = gr.HTML("{}", html_template='<div class="card"></div>', apply_default_css=False,
                       js_on_load="MoEpic.card(element, props, watch)", elem_id="card")  # fmt: skip
        with gr.Row(elem_id="options"):
            link = gr.Dropdown(
                link_choices(device),
                label="Link",
                allow_custom_value=device == "cpu",
                interactive=device == "cpu",
                scale=6,
                min_width=150,
                elem_id="link",
            )
            strategies = [(name, name) for name in STRATEGIES]
            strategy = gr.Dropdown(strategies, label="Strategy", scale=4, min_width=120, elem_id="strategy")
            context = gr.Number(label="Context (tokens)", precision=0, minimum=1, placeholder="up to 4096",
                                scale=3, min_width=90, elem_id="context")  # fmt: skip
        refresh = gr.Button(visible="hidden", elem_id="refresh")
    return Model(checkpoint, link, strategy, context, card, load, cancel, refresh, gr.State(None))


def link_choices(device: DeviceKind) -> list[tuple[str, str]]:
    """(label, name) of the links that a device can use."""
    if device == "cuda":
        return [("The GPU's own bus", "auto")]
    presets = [(f"Emulated {name}, {format_bytes(rate)}/s", name) for name, rate in sorted(PRESETS_BYTES_PER_S.items())]
    return [("Disk", "auto"), *presets]


def wire(model: Model, budget: Budget, state: State, page: gr.Blocks) -> None:
    def settings(checkpoint: str | None, link: str, strategy: str, context: float | None) -> Settings:
        if not checkpoint:
            raise BadSettings("no checkpoint is chosen; pick one, or type a folder or a hub id")
        length = int(context) if context else None
        vram = state.settings.vram if checkpoint == state.settings.checkpoint else "auto"
        return state.settings.replace(
            checkpoint=checkpoint, link=link, strategy=strategy, context_length=length, vram=vram
        )

    def show(preview: Preview) -> list[Any]:
        """Values for selection, card, button, slider and bar."""
        card = {"loads": state.look().loads, **views.model_card(preview)}
        button = gr.Button("Reload", variant="secondary") if preview.loaded else gr.Button("Load", variant="primary")
        return [preview, json.dumps(card), button, *budget.show(preview)]

    def show_problem(error: MoepicError) -> list[Any]:
        card = {"loads": state.look().loads, **views.problem_card(str(error))}
        return [None, json.dumps(card), gr.Button("Load", variant="primary"), *budget.show(None)]

    def choose(*choices: Any) -> list[Any]:
        """Something else was picked: says what it would need. A change of strategy alone holds at once."""
        state.clear_notice()
        try:
            wanted = settings(*choices)
            loaded = state.look().loaded
            if loaded is not None and is_same_model(wanted, loaded.settings):
                state.reconfigure(strategy=wanted.strategy)
            return show(state.preview(wanted))
        except MoepicError as error:
            return show_problem(error)

    def load(selection: Preview | None, gigabytes: float, *choices: Any) -> None:
        try:
            wanted = settings(*choices)
            if selection is not None and selection.budget_bytes is not None:
                wanted = wanted.replace(vram=wanted_vram(selection, gigabytes))
            state.load(wanted)
        except MoepicError as error:
            state.tell("error", str(error))

    def refresh() -> list[Any]:
        """What a new page shows, and every page after a load: the model that is loaded or on its way."""
        loaded = state.look().loaded
        current = loaded.settings if loaded is not None else state.settings
        values = [
            gr.Dropdown(choices=checkpoints.choices(current.checkpoint), value=current.checkpoint),
            current.link,
            current.strategy,
            current.context_length,
        ]
        try:
            return [*values, *show(state.preview(current))]
        except MoepicError as error:
            return [*values, *show_problem(error)]

    shown = [model.selection, model.card, model.load, budget.slider, budget.bar]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    inputs = [model.checkpoint.input, model.link.input, model.strategy.input, model.context.input]
    gr.on(inputs, choose, model.choices, shown, **quiet)
    model.load.click(load, [model.selection, budget.slider, *model.choices], None, **quiet)
    model.cancel.click(state.cancel_load, None, None, **quiet)
    gr.on([page.load, model.refresh.click], refresh, None, [*model.choices, *shown], **quiet)
