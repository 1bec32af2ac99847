"""What the engine is doing, live: speed, hardware, layers, experts and the last token. Drawn by assets/live.js.

Python writes the frame with every figure's name and definition; numbers and pictures come with what the script asks
for twice a second. The number that matters in a picture is also text (`data-t`) and part of its label.
"""

from __future__ import annotations

import gradio as gr

from moepic_core.spec import DeviceKind

from ..terms import HISTORY_TOKENS, term
from ..views import UNKNOWN

METERS = (
    ("experts", "Experts in", "expert_traffic"),
    ("gpu", "GPU", "gpu_use"),
    ("cpu", "CPU", "cpu_use"),
    ("pcie-in", "PCIe in", "pcie_in"),
    ("pcie-out", "PCIe out", "pcie_out"),
    ("disk", "Disk read", "disk_read"),
    ("power", "Power", "power"),
    ("temperature", "Temp.", "temperature"),
)


def build(device: DeviceKind) -> None:
    panels = (speed(), hardware(device), layers(), experts(), last_token())
    gr.HTML(
        "",
        html_template=f'<div class="see">{"".join(panels)}</div>',
        js_on_load="MoEpic.see(element)",
        apply_default_css=False,
        elem_id="see",
    )


def speed() -> str:
    head = (
        f"<h2>{term('Speed', 'speed_history')}</h2><span class='note'>last {HISTORY_TOKENS} tokens</span>"
        f"<span class='big'>{_value('speed')}</span><span class='note'>{term('tokens/s now', 'speed_now')}</span>"
    )
    return _panel("speed", head, _canvas("speed"))


def hardware(device: DeviceKind) -> str:
    ours, other = (("VRAM", "vram"), ("RAM", "ram"))[:: 1 if device == "cuda" else -1]
    meters = "".join(
        f'<div class="meter" data-m="{key}"><span>{term(label, metric)}</span>{_value(key)}<i><b></b></i></div>'
        for key, label, metric in (*METERS, (other[1], *other))
    )
    head = "<h2>Hardware</h2><span class='note cut' data-t='device'></span><span class='chip' data-t='source'></span>"
    return _panel(
        "hardware",
        head,
        f'<div class="device"><span>{term(ours[0], "device_memory")}</span>'
        f'<div class="bar" role="img" tabindex="0"></div>{_value("memory")}</div>'
        f'<div class="meters">{meters}</div>',
    )


def layers() -> str:
    head = (
        f"<h2>Layers</h2>"
        f"<span class='note'>{_key('hit')}{term('hits', 'hit_rate')} {_value('hits')}</span>"
        f"<span class='note'>{_key('partial')}{term('partial', 'partial_hit_rate')} {_value('partial')}</span>"
        f"<span class='note'>{_key('miss')}{term('misses', 'miss_rate')} {_value('misses')}</span>"
        f"<span class='note'>{_key('ceiling')}{term('ceiling', 'ceiling')} {_value('ceiling')}</span>"
        f"<span class='note cut'>{term('most misses', 'worst_layers')} {_value('worst')}</span>"
        f"{_choice('scope', 'Which tokens', {'last': 'last reply', 'session': 'session'})}"
    )
    below = (
        f'<p class="under"><span>{_key("split")}{term("split ratio", "split_ratio")} {_value("split")}</span>'
        f"<span>{_key('slots')}{term('slots', 'slots')} {_value('slots')}, as a share of the experts</span></p>"
    )
    return _panel("layers", head, _canvas("layers") + below + _canvas("plan"))


def experts() -> str:
    head = (
        f"<h2>Experts</h2><span class='note'>{_value('on-device')} {term('on the device', 'on_device')}</span>"
        f"<span class='note'>{_key('whole')}{term('whole', 'residency')} {_value('whole')}</span>"
        f"<span class='note'>{_key('tops')}{term('top', 'residency')} {_value('tops')}</span>"
        f"<span class='note'>{_key('nothing')}{term('host only', 'residency')}</span>"
        f"<span class='note cut'>stronger: {term('used more', 'use')}</span>"
        f"{_choice('order', 'Order of experts', {'use': 'by use', 'number': 'by number'})}"
    )
    return _panel("heat", head, _canvas("heat"))


def last_token() -> str:
    head = (
        f"<h2>Last token</h2><span class='note'>{term('took', 'token_s')} {_value('token')}</span>"
        f"<span class='note'>{_key('stall')}{term('stall', 'token_stall_s')} {_value('stall')}</span>"
        f"<span class='note'>{term('overlap', 'token_overlap')} {_value('overlap')}</span>"
        f"<span class='note cut'>{term('prefetch accuracy', 'prefetch_accuracy')} {_value('accuracy')}</span>"
        f"<span class='note end'>{_key('compute')}compute</span>"
        f"<span class='note'>{_key('demand')}{term('demand', 'demand_bytes')}</span>"
        f"<span class='note'>{_key('prefetch')}{term('prefetch', 'prefetch_bytes')}</span>"
    )
    return _panel("token", head, _canvas("token"))


def _panel(name: str, head: str, body: str) -> str:
    return f'<section class="panel" data-p="{name}"><div class="head">{head}</div>{body}</section>'


def _canvas(name: str) -> str:
    """The script keeps the label up to date."""
    return f'<div class="plot"><canvas data-c="{name}" role="img" aria-label="Nothing yet" tabindex="0"></canvas></div>'


def _value(name: str) -> str:
    return f'<b data-t="{name}">{UNKNOWN}</b>'


def _key(kind: str) -> str:
    return f'<i class="key {kind}" aria-hidden="true"></i>'


def _choice(name: str, label: str, options: dict[str, str]) -> str:
    """Buttons of which one is pressed, the first at the start."""
    buttons = "".join(
        f'<button type="button" data-{name}="{key}" aria-pressed="{str(place == 0).lower()}">{text}</button>'
        for place, (key, text) in enumerate(options.items())
    )
    return f'<span class="choice" role="group" aria-label="{label}">{buttons}</span>'
