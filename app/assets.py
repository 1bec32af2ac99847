"""Our own scripts and styles: their names, where they lie, and the tags that bring them to the page."""

from __future__ import annotations

from pathlib import Path

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
SERVED = (*STYLES, *SCRIPTS, ICON)
STYLE_TAGS = "".join(f'<link rel="stylesheet" href="ui/{name}">' for name in STYLES)
# For components, which wait for what stands in their own head. That of the page may be read after they have begun.
SCRIPT_TAGS = "".join(f'<script src="ui/{name}"></script>' for name in SCRIPTS)
