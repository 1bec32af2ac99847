"""The top line: name, what is going on, live figures, light or dark; below it, notices. Drawn by assets/page.js."""

from __future__ import annotations

import gradio as gr

from .. import views
from ..terms import term


def build() -> None:
    figures = "".join(
        f'<div><dt>{term(figure.label, figure.metric)}</dt><dd data-figure="{figure.key}">{views.UNKNOWN}</dd></div>'
        for figure in views.FIGURES
    )
    gr.HTML(
        "",
        html_template=f"""
            <header class="top">
              <button type="button" class="aside" aria-controls="side" aria-label="Conversations and answer settings"
                data-tip="Conversations and answer settings (Alt + L)">☰</button>
              <h1><img src="ui/favicon.svg" alt="" width="22" height="22"><span>MoEpic</span></h1>
              <p class="pill" role="status"><i aria-hidden="true"></i><span data-live="status">connecting …</span></p>
              <dl class="figures" aria-label="Live figures of the last reply">{figures}</dl>
              <p class="chip" data-live="link" title="These numbers were measured over it" hidden></p>
              <div class="tools">
                <button type="button" data-explore="helping">Is it helping?</button>
                <button type="button" data-explore="timeline">Explore</button>
              </div>
              <button type="button" class="fold" aria-controls="controls" aria-label="Model and engine"
                data-tip="Show or hide model and engine (Alt + E)">◨</button>
              <button type="button" class="theme" aria-label="Switch between light and dark">◐</button>
            </header>
            <p class="strip" data-live="warning" hidden></p>
            <div class="notice" role="alert" hidden>
              <p data-live="notice"></p><button type="button" aria-label="Dismiss this message">×</button>
            </div>""",
        js_on_load="MoEpic.header(element)",
        apply_default_css=False,
        elem_id="header",
    )
