"""How the model answers: system prompt and sampling. The chat reads these with every message and keeps them with it.

Where a new conversation starts from, and what a reset goes back to, `sampling` knows for each checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .. import sampling
from ..state import State

DEFAULTS: dict[str, Any] = {"system": "", **sampling.DEFAULTS, "seed": None}
PRESETS: dict[str, dict[str, Any]] = {
    "Precise": {"temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.0},
    "Balanced": {key: DEFAULTS[key] for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "Creative": {"temperature": 1.1, "top_p": 0.95, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.05},
}
LIMITS = {**sampling.LIMITS, "seed": (0, 2**31 - 1)}  # least, greatest
WHOLE = ("top_k", "max_new_tokens", "seed")


@dataclass(frozen=True)
class Answers:
    preset: gr.Radio
    reset: gr.Button
    fields: Mapping[str, gr.components.Component]  # in the order of DEFAULTS

    @property
    def inputs(self) -> list[gr.components.Component]:
        return list(self.fields.values())

    @property
    def outputs(self) -> list[gr.components.Component]:
        """What `shown` returns values for."""
        return [self.preset, *self.fields.values()]


def build() -> Answers:
    with gr.Column(elem_id="answers"):
        system = gr.Textbox(
            label="System prompt",
            value="",
            placeholder="None: the model's own manner",
            lines=2,
            max_lines=8,
            elem_id="system",
        )
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            preset = gr.Radio(list(PRESETS), value="Balanced", label="Preset", elem_id="preset")
            fields = {
                "system": system,
                "temperature": _slider("temperature", "Temperature", 0.05, "0 always takes the likeliest token"),
                "top_p": _slider("top_p", "Top-p", 0.05, "Only the likeliest tokens that together have this share"),
                "top_k": _slider("top_k", "Top-k", 1, "Only so many of the likeliest tokens; 0: all"),
                "min_p": _slider("min_p", "Min-p", 0.01, "Only tokens with this share of the likeliest one's chance"),
                "repetition_penalty": _slider("repetition_penalty", "Repetition penalty", 0.01, "1: none"),
                "max_new_tokens": _slider("max_new_tokens", "Longest answer (tokens)", 16, None),
                "seed": gr.Number(label="Seed", info="Empty: another answer every time", precision=0, minimum=0,
                                  maximum=LIMITS["seed"][1], elem_id="seed"),
            }  # fmt: skip
            reset = gr.Button("Reset to the checkpoint's own", size="sm", elem_id="reset")
    return Answers(preset, reset, fields)


def _slider(name: str, label: str, step: float, info: str | None) -> gr.Slider:
    return gr.Slider(*LIMITS[name], DEFAULTS[name], step=step, label=label, info=info, buttons=[])


def wire(answers: Answers, state: State) -> None:
    def reset(system: str) -> list[Any]:
        return shown({"system": system, **sampling.reset(state)})

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    preset = {name: answers.fields[name] for name in PRESETS["Balanced"]}
    answers.preset.input(lambda name: list(PRESETS[name].values()), answers.preset, list(preset.values()), **quiet)
    answers.reset.click(reset, answers.fields["system"], answers.outputs, **quiet)
    gr.on(
        [slider.input for slider in preset.values() if isinstance(slider, gr.Slider)],
        lambda *values: preset_of(dict(zip(preset, values, strict=True))),
        list(preset.values()),
        answers.preset,
        trigger_mode="always_last",
        **quiet,
    )


def preset_of(values: Mapping[str, Any]) -> str | None:
    """The preset that has these values, if one has."""
    return next((name for name, preset in PRESETS.items() if all(values[key] == preset[key] for key in preset)), None)


def settings(*values: Any) -> dict[str, Any]:
    """The values of `Answers.inputs` by name."""
    given = dict(zip(DEFAULTS, values, strict=True))
    return {name: int(value) if name in WHOLE and value is not None else value for name, value in given.items()}


def shown(settings: Mapping[str, Any]) -> list[Any]:
    """Values for `Answers.outputs`: what a conversation was last asked with, as far as the fields can show it."""
    values = {name: settings.get(name, default) for name, default in DEFAULTS.items()}
    for name, (least, greatest) in LIMITS.items():
        if values[name] is not None:
            values[name] = min(max(values[name], least), greatest)
    return [preset_of(values), *values.values()]
