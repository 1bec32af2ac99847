"""Plotly figures as PNG files, drawn in a Chromium without a window; for documents and model cards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def save(figure: Any, path: Path) -> None:
    """Draws `figure`, whose layout has a width and a height in pixels. Needs playwright and a Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": figure.layout.width + 16, "height": figure.layout.height + 16}
        page = browser.new_page(viewport=size)  # type: ignore[arg-type]
        page.set_content(figure.to_html(include_plotlyjs=True), wait_until="load")
        page.locator(".main-svg").first.wait_for()
        page.screenshot(path=path)
        browser.close()
