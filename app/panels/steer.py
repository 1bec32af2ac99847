"""The settings behind the button "More": how experts are split, evicted and prefetched, and what was decided and why.

Open, it lies over the speed and the hardware, so that one sees what a change does to layers and experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from moepic_core.spec import Settings

from .. import cards
from ..nouns import Preview

EVICTIONS = {
    "auto": "Automatic",
    "lcp-aged": "LCP with ageing",
    "lcp": "LCP, the paper's",
    "lru": "Least recently used",
    "lfu": "Least often used",
    "request-frequency": "Rarest in the request",
}
PREFETCH = {"auto": "Automatic", "off": "Off"}  # or a number of guesses
TIPS = {  # what a setting means, by its place on the page
    "checkpoint": "A line of the list, a folder with config.json and *.safetensors, a folder that holds such folders, "
    "or an id on the Hugging Face hub.",
    "link": "The way that experts travel to the device. An emulated link moves real bytes in RAM and is as slow as a "
    "real one; its numbers are labelled so. Needs a reload; the conversation stays.",
    "strategy": "A preset of split, eviction, shares and prefetch of the one engine: moepic, or a baseline. Holds from "
    "the next token on.",
    "slider": "All device memory that may be used. Holds from the next token on, without a reload.",
    "by-hand": "Off: the plan finds a split ratio for each layer.",
    "split": "The part of an expert that a cache slot keeps: 0 is prefetch only, 1 caches whole experts. Holds from "
    "the next token on.",
    "eviction": "Who leaves the cache for a newcomer. Automatic: as the strategy says; moepic takes what would have "
    "hit most. Holds from the next token on.",
    "prefetch": "How many experts of the next layer are guessed and fetched before they are needed. Automatic: as many "
    "as the plan finds to pay. Holds from the next token on.",
    "reserved": "Memory that other programs shall have, whatever the model: budgets end before it. A tenth of what is "
    "free always stays free.",
    "context": "Tokens that KV memory is reserved for, prompt and answer together. Needs a reload.",
    "automatic": "Budget, strategy, split, eviction and prefetch as found best by the plan.",
}


@dataclass(frozen=True)
class Steer:
    by_hand: gr.Checkbox
    split: gr.Slider
    eviction: gr.Dropdown
    prefetch: gr.Dropdown
    reserved: gr.Slider
    context: gr.Number
    automatic: gr.Button
    why: gr.HTML


def build() -> Steer:
    with gr.Column(elem_id="steer"):
        with gr.Row(elem_id="steer-head"):
            gr.HTML("", html_template="<h2>How experts are split, kept and fetched</h2>", apply_default_css=False)
            automatic = gr.Button("Reset to automatic", size="sm", elem_id="automatic")
        with gr.Row(elem_id="settings"):
            with gr.Column(min_width=170, scale=4, elem_id="split-column"):
                split = gr.Slider(0, 1, 0.5, step=0.05, label="Split ratio", buttons=[], elem_id="split")
                by_hand = gr.Checkbox(False, label="By hand", container=False, elem_id="by-hand")
            eviction = gr.Dropdown([(label, name) for name, label in EVICTIONS.items()], label="Eviction",
                                   scale=4, min_width=130, elem_id="eviction")  # fmt: skip
            prefetch = gr.Dropdown(prefetch_choices("auto", 0), label="Prefetch", scale=3,
                                   min_width=110, elem_id="prefetch")  # fmt: skip
            reserved = gr.Slider(0, 1, 0, label="Reserved (GB)", buttons=[], scale=4, min_width=150,
                                 elem_id="reserved")  # fmt: skip
            context = gr.Number(label="Context (tokens)", precision=0, minimum=1, placeholder="up to 4096",
                                scale=3, min_width=110, elem_id="context")  # fmt: skip
        why = gr.HTML("null", html_template=f'<div class="why" data-tips="{_attribute(TIPS)}"></div>',
                      apply_default_css=False, js_on_load="MoEpic.steer(element, props, watch)",
                      elem_id="why")  # fmt: skip
    return Steer(by_hand, split, eviction, prefetch, reserved, context, automatic, why)


def shown(settings: Settings, preview: Preview | None) -> list[Any]:
    """Values for the fields in the order of `Steer`, without the button."""
    split = settings.split
    if split is None and preview is not None and preview.in_force is not None:
        ratios = [share.split_ratio for share in preview.in_force.layers]
        split = sum(ratios) / len(ratios)
    top_k = preview.spec.top_k if preview is not None and preview.spec is not None else 0
    has_memory = preview is not None and preview.needs is not None
    return [
        settings.split is not None,
        gr.Slider(value=round(0.5 if split is None else split, 2), interactive=settings.split is not None),
        settings.eviction,
        gr.Dropdown(choices=prefetch_choices(settings.prefetch, top_k), value=settings.prefetch or "off"),
        reserved_slider(preview) if preview is not None and has_memory else gr.Slider(),
        settings.context_length,
        json.dumps(why(preview)),
    ]


def prefetch_choices(present: str | int, top_k: int) -> list[tuple[str, str | int]]:
    """Labels and settings: up to as many guesses as a token uses experts in a layer, and what is in force."""
    choices: list[tuple[str, str | int]] = [(label, name) for name, label in PREFETCH.items()]
    numbers = [*range(1, top_k + 1), *([present] if isinstance(present, int) and present > top_k else [])]
    choices += [(f"{number} guess{'es' if number > 1 else ''}", number) for number in numbers]
    return [*choices, ("On", "on")] if present == "on" else choices


def reserved_slider(preview: Preview) -> gr.Slider:
    """From nothing to all but what the model needs at least."""
    assert preview.needs is not None, preview.settings.checkpoint
    spare = max(preview.free_bytes + preview.reserved_bytes - preview.needs.smallest, preview.reserved_bytes)
    most = max(0.1, int(spare / cards.UNITS["GB"] * 10) / 10)
    return gr.Slider(maximum=most, step=0.1, value=min(most, round(preview.reserved_bytes / cards.UNITS["GB"], 1)))


def why(preview: Preview | None) -> list[tuple[str, str]] | None:
    """What was decided and why; None where nothing is decided yet."""
    if preview is None or preview.spec is None or preview.budget_bytes is None:
        return None
    routing = preview.forecast.origin if preview.forecast is not None else ""
    return cards.plan_rows(preview.plan(preview.budget_bytes), preview.spec, routing)


def _attribute(value: Any) -> str:
    """JSON within a quoted attribute of a template, in which ${ and { mean something."""
    text = json.dumps(value)
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("'", "&#39;").replace("<", "&lt;")
