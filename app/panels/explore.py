"""What is looked at on demand, in one dialog: is it helping, pictures to zoom into, and what can be shared.

Python writes the frame with every figure's definition; assets/explore.js fills it from `explore_routes` when it is
opened, and loads Plotly only when a picture is to be drawn. The header's buttons open it.
"""

from __future__ import annotations

import gradio as gr

from ..terms import term

TABS = {
    "helping": "Is it helping?",
    "timeline": "Timeline",
    "budgets": "Speed and budget",
    "sizes": "Hits and cache size",
    "share": "Share",
}
PICTURES = {  # tab → what it shows, in HTML
    "timeline": "Every event of the last tokens, layer by layer: compute, demand loads, prefetches, stalls.",
    "budgets": f"{term('Time per token', 'predicted_tpot')} over the memory budget, for every strategy.",
    "sizes": f"{term('Hit rate', 'replayed_hits')} over the size of the cache, for every eviction policy.",
}
FILES = (
    ("trace.npz", "Trace (.npz)", "Routing, events, residency, plan and figures; numpy.load opens it."),
    ("trace.json", "Facts (.json)", "Settings, plan, machine and figures alone."),
    ("report.html", "Report (.html)", "Figures and pictures in one page that opens offline."),
    ("settings.json", "Settings (.json)", "To import here, or on another machine."),
)
COLUMNS = (
    ("tokens/s", "compared_speed"),
    ("ratio", "compared_ratio"),
    ("hits", "hit_rate"),
    ("partial", "partial_hit_rate"),
    ("link per token", "compared_bytes"),
    ("stall per token", "compared_stall"),
)


def build() -> None:
    tabs = "".join(
        f'<button type="button" role="tab" id="tab-{name}" aria-controls="view-{name}">{label}</button>'
        for name, label in TABS.items()
    )
    bodies = [_helping(), *map(_picture, PICTURES), _share()]
    views = "".join(
        f'<section role="tabpanel" id="view-{name}" aria-labelledby="tab-{name}" hidden>{body}</section>'
        for name, body in zip(TABS, bodies, strict=True)
    )
    gr.HTML(
        "",
        html_template=f"""<dialog class="explore" aria-label="Explore and share">
            <div class="bar"><div role="tablist" aria-label="Views">{tabs}</div>
              <button type="button" class="close" aria-label="Close">×</button></div>{views}</dialog>""",
        js_on_load="MoEpic.explore(element)",
        apply_default_css=False,
        elem_id="explore",
    )


def _helping() -> str:
    head = "".join(f'<th scope="col">{term(label, metric)}</th>' for label, metric in COLUMNS)
    return f"""
        <p class="lead">Measures one prompt with cache, split and prefetch switched off and on. It asks what is
          written in the message field, or the last question of the conversation. The conversation stays as it is.</p>
        {_work("Measure")}
        <p class="verdict" role="status" hidden><span></span>
          <button type="button" class="use">Use these settings</button></p>
        <div class="wide"><table hidden><thead><tr><th scope="col">Settings</th>{head}</tr></thead>
          <tbody></tbody></table></div>
        <p class="foot"></p>"""


def _picture(name: str) -> str:
    return f"""
        <p class="lead">{PICTURES[name]}</p>{_work("Draw")}
        <div class="picture" role="img" aria-label="{TABS[name]}: not drawn yet"></div><p class="foot"></p>"""


def _share() -> str:
    files = "".join(
        f'<li><button type="button" data-file="{name}">{label}</button><span>{words}</span></li>'
        for name, label, words in FILES
    )
    return f"""
        <p class="lead">Files for others and for later. They hold no conversation, but the report quotes the question
          that was measured, and settings name the checkpoint as you chose it.</p>
        <ul class="files">{files}
          <li><button type="button" class="import">Import settings</button><span>From a settings file; what needs
            loading is loaded.</span><input type="file" accept=".json" hidden aria-label="File with settings"></li></ul>
        <p class="status" role="status"></p>"""


def _work(label: str) -> str:
    return f"""<div class="work"><button type="button" class="start">{label}</button>
        <button type="button" class="stop" hidden>Stop</button>
        <progress max="1" value="0" hidden aria-label="Progress"></progress><span role="status"></span></div>"""
