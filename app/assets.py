"""Our own scripts and styles: their names, where they lie, and the tags that bring them to the page."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "assets"
ICON = "favicon.svg"
STYLES = ("page.css", "live.css", "chat.css")
SCRIPTS = ("page.js", "live.js", "chat.js")  # the first one makes `MoEpic`, the others add to it
SERVED = (*STYLES, *SCRIPTS, ICON)
STYLE_TAGS = "".join(f'<link rel="stylesheet" href="ui/{name}">' for name in STYLES)
# For components, which wait for what stands in their own head. That of the page may be read after they have begun.
SCRIPT_TAGS = "".join(f'<script src="ui/{name}"></script>' for name in SCRIPTS)
