"""The list of conversations at the side: new, search, open, rename, delete, export, import, and the keyboard's list.

assets/chat.js draws it from our own routes (`app/conversation_routes.py`), always as text. The component is also the
page's thread to the open conversation: its value says which one it is and what stands under each message, and its
events say what the user wants with it. The value lives in the browser, so it outlives the server.
"""

from __future__ import annotations

from html import escape

import gradio as gr

from moepic_core.metrics import METRICS

SHORTCUTS = (
    ("Enter", "send the message"),
    ("Shift + Enter", "a new line in the message"),
    ("Esc", "stop the answer"),
    ("Alt + N", "new chat"),
    ("Alt + M", "go to the message"),
    ("Alt + K", "search conversations"),
    ("Alt + L", "show or hide the list of conversations"),
    ("Alt + E", "show or hide model and engine"),
    ("?", "this list"),
)


def build() -> gr.HTML:
    definitions = {metric.name: metric.definition for metric in METRICS}
    figures = " ".join(
        f"{name}: {definitions[key]}" for name, key in (("tokens/s", "tokens_per_s"), ("First token", "ttft_s"))
    )
    shortcuts = "".join(f"<dt><kbd>{escape(keys)}</kbd></dt><dd>{escape(what)}</dd>" for keys, what in SHORTCUTS)
    return gr.HTML(
        "{}",
        html_template=f"""
            <nav class="talks" aria-label="Conversations" data-figures="{escape(figures)}">
              <button type="button" class="new">New chat</button>
              <input type="search" placeholder="Search conversations" aria-label="Search conversations">
              <p class="unsaved" role="alert" hidden></p>
              <ul></ul>
              <p class="none" hidden></p>
              <p class="undo" role="status" hidden><span></span><button type="button">Undo</button></p>
              <div class="more">
                <button type="button" class="import">Import</button>
                <a class="export" href="ui/conversations.json" download>Export all</a>
                <button type="button" class="keys">Keyboard</button>
              </div>
              <input type="file" accept=".json,.md,.markdown,.txt" hidden aria-label="File with conversations">
            </nav>
            <dialog class="shortcuts" aria-labelledby="shortcuts-title">
              <h2 id="shortcuts-title">Keyboard</h2><dl>{shortcuts}</dl>
              <form method="dialog"><button>Close</button></form>
            </dialog>""",
        js_on_load="MoEpic.conversations(element, props, watch, trigger)",
        apply_default_css=False,
        elem_id="conversations",
    )
