"""Takes the documents' pictures from the real application: `python docs/take_pictures.py [options of launch.py]`.

Starts it with a folder of its own, asks questions, and photographs the page: every number is this machine's own. What
it shows beside the finished answer: loading, an error, and the page of a phone. A machine without a GPU gives pictures
without GPU readings. Needs requirements-test.txt and a Chromium. Writes docs/pictures/page-*.png.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
QUESTIONS = ("What is a split ratio?", "and why?", "Why is my hit rate low?", "Tell me a short story about a fox")
VIEWS = {"light": (1440, 900, 1), "dark": (1440, 900, 1), "phone": (390, 844, 2)}
LIMIT_BYTES = 400_000


def main(options: list[str]) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium; install it with: sudo apt-get install chromium")
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, str(ROOT / "launch.py"), "--no-setup", "--no-browser", *options]
        app = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOEPIC_HOME": home})
        assert app.stdout is not None
        found = next(filter(None, (re.search(r"is ready at (\S+)", line) for line in app.stdout)), None)
        if found is None:
            sys.exit("the application did not start, see above")
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = opened(browser, found[1], "light")
                photograph(page, "loading")
                page.locator("[data-live=status]").get_by_text("ready").wait_for(timeout=600_000)
                for question in QUESTIONS:
                    ask(page, question)
                for name in VIEWS:
                    photograph(opened(browser, found[1], name, like=page), name)
                fail(page)
                photograph(page, "error")
        finally:
            app.send_signal(signal.SIGINT)
            app.wait()


def opened(browser: Browser, address: str, name: str, like: Page | None = None) -> Page:
    """A window of its own; `like` another, with the conversation that is open there."""
    width, height, scale = VIEWS[name]
    page = browser.new_context(
        viewport={"width": width, "height": height}, device_scale_factor=scale,
        storage_state=like.context.storage_state() if like else None,
    ).new_page()  # fmt: skip
    page.goto(f"{address}/?__theme={'dark' if name == 'dark' else 'light'}")
    page.get_by_label("Message", exact=True).wait_for(timeout=60_000)
    if like:
        expect(page.locator("#conversation .bot.message")).to_have_count(len(QUESTIONS), timeout=60_000)
        page.wait_for_timeout(2_000)  # panels are drawn twice a second
    return page


def ask(page: Page, question: str) -> None:
    notes = page.locator(".under-message .note")
    before = notes.count()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(notes).to_have_count(before + 1, timeout=600_000)
    expect(notes.last).to_contain_text("tokens/s", timeout=600_000)


def fail(page: Page) -> None:
    """Picks a checkpoint that is none."""
    with tempfile.TemporaryDirectory(prefix="not-a-model-") as folder:
        picker = page.get_by_label("Checkpoint, folder or hub id")
        picker.fill(folder)
        picker.press("Enter")
        page.wait_for_timeout(3_000)


def photograph(page: Page, name: str) -> None:
    path = PICTURES / f"page-{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < LIMIT_BYTES, f"{path} has {path.stat().st_size} bytes, wanted under {LIMIT_BYTES}"
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
