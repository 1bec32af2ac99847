"""Our own scripts and styles: their names, where they lie, and the tags that bring them to the page."""

from __future__ import annotations

from pathlib import Path

from gradio.routes import templates
from jinja2 import ChoiceLoader, DictLoader

FOLDER = Path(__file__).resolve().parent.parent / "assets"
ICON = "favicon.svg"
STYLES = ("page.css", "steer.css", "live.css", "chat.css", "explore.css")
# The first one makes `MoEpic`, the others add to it.
SCRIPTS = (
    "page.js",
    "steer.js",
    "live.js",
    "chat.js",
    "explore.js",
)
FIRST_SCRIPT = "frames.js"
SERVED = (*STYLES, *SCRIPTS, FIRST_SCRIPT, ICON)
STYLE_TAGS = "".join(f'<link rel="stylesheet" href="ui/{name}">' for name in STYLES)
# For components, which wait for what stands in their own head. That of the page may be read after they have begun.
SCRIPT_TAGS = "".join(f'<script src="ui/{name}"></script>' for name in SCRIPTS)
FIRST_TAG = f'<script src="ui/{FIRST_SCRIPT}"></script>'
GRADIO_PAGE = "frontend/index.html"


def run_first() -> None:
    """Has Gradio's page run FIRST_SCRIPT before its own scripts: what it is given as a head comes after them."""
    loader = templates.env.loader
    assert loader is not None
    source = loader.get_source(templates.env, GRADIO_PAGE)[0]
    before, base, after = source.partition("<base ")  # which addresses are relative to
    end = after.index("/>") + len("/>")
    if FIRST_TAG not in source:
        page = before + base + after[:end] + FIRST_TAG + after[end:]
        templates.env.loader = ChoiceLoader([DictLoader({GRADIO_PAGE: page}), loader])
