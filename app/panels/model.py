"""The choice of a model: which checkpoint, whether it runs here, loading it, and the two settings that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.links import PRESETS_BYTES_PER_S, parse_link
from moepic_core.spec import STRATEGIES, DeviceKind
from moepic_core.units import format_bytes

from ..nouns import Preview


@dataclass(frozen=True)
class Model:
    checkpoint: gr.Dropdown
    load: gr.Button
    cancel: gr.Button
    card: gr.HTML
    link: gr.Dropdown
    strategy: gr.Dropdown
    refresh: gr.Button  # never seen: the page's script presses it when a model has come or gone
    renew: gr.Button  # nor this: it presses it when something else has changed


def build(device: DeviceKind) -> Model:
    with gr.Column(elem_id="model"):
        with gr.Row(elem_id="picker"):
            checkpoint = gr.Dropdown(
                [], label="Checkpoint, folder or hub id", allow_custom_value=True, scale=4, elem_id="checkpoint"
            )
            load = gr.Button("Load", variant="primary", scale=1, min_width=88, elem_id="load")
            cancel = gr.Button("Cancel", scale=1, min_width=88, elem_id="cancel")
        card = gr.HTML("{}", html_template='<div class="card"></div>', apply_default_css=False,
                       js_on_load="MoEpic.card(element, props, watch)", elem_id="card")  # fmt: skip
        with gr.Row(elem_id="options"):
            link = gr.Dropdown(
                link_choices(device, "auto"),
                label="Link",
                allow_custom_value=device == "cpu",
                interactive=device == "cpu",
                scale=6,
                min_width=150,
                elem_id="link",
            )
            strategies = [(name, name) for name in STRATEGIES]
            strategy = gr.Dropdown(strategies, label="Strategy", scale=5, min_width=120, elem_id="strategy")
            gr.Button("More", scale=1, min_width=70, elem_id="more")
        refresh = gr.Button(visible="hidden", elem_id="refresh")
        renew = gr.Button(visible="hidden", elem_id="renew")
    return Model(checkpoint, load, cancel, card, link, strategy, refresh, renew)


def link_choices(device: DeviceKind, current: str) -> list[tuple[str, str]]:
    """(label, name) of the links that a device can use, `current` among them."""
    if device == "cuda":
        return [("The GPU's own bus", "auto")]
    presets = [(f"Emulated {name}, {format_bytes(rate)}/s", name) for name, rate in sorted(PRESETS_BYTES_PER_S.items())]
    choices = [("Disk", "auto"), *presets]
    if current not in [name for _, name in choices]:
        label = parse_link(current, device).label.replace("emulated link", "Emulated")
        choices.append((label.replace("disk", "Disk"), current))
    return choices


def load_button(preview: Preview | None) -> gr.Button:
    """What pressing it would do."""
    values: dict[str, Any] = {"value": "Load", "variant": "primary"}
    if preview is not None and preview.loaded:
        values = {"value": "Reload", "variant": "secondary"}
    elif preview is not None and preview.may_be_tried:
        values = {"value": "Load anyway", "variant": "stop"}
    elif preview is not None and preview.spec is None:
        values["value"] = "Download"
    elif preview is not None and preview.reloads:
        values["value"] = "Reload"
    return gr.Button(**values)
