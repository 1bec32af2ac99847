"""The top line: name, what is going on, live figures, light or dark; below it, notices. Drawn by assets/page.js."""

from __future__ import annotations

from html import escape

import gradio as gr

from .. import views

LOGO = (
    '<svg class="logo" viewBox="0 0 24 24" aria-hidden="true"><rect class="on" x="2" y="2" width="9" height="9" rx="2"/>'
    '<rect x="13.9" y="2.9" width="7.2" height="7.2" rx="1.4"/><rect x="2.9" y="13.9" width="7.2" height="7.2" rx="1.4"/>'
    '<rect class="on" x="13" y="13" width="9" height="9" rx="2"/></svg>'
)


def build() -> None:
    figures = "".join(
        f'<div title="{escape(figure.definition)}"><dt>{figure.label}</dt>'
        f'<dd data-figure="{figure.key}">{views.UNKNOWN}</dd></div>'
        for figure in views.FIGURES
    )
    gr.HTML(
        "",
        html_template=f"""
            <header class="top">
              <h1>{LOGO}<span>MoEpic</span></h1>
              <p class="pill" role="status"><i aria-hidden="true"></i><span data-live="status">connecting …</span></p>
              <dl class="figures" aria-label="Live figures of the last reply">{figures}</dl>
              <p class="chip" data-live="link" title="These numbers were measured over it" hidden></p>
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
