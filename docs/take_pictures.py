"""Takes the README's pictures from the real application: `python docs/take_pictures.py [options of launch.py]`.

Starts it, asks a question, and photographs the page in the middle of the answer: every number is this machine's own.
Needs requirements-test.txt and a Chromium. Writes docs/pictures/page-{light,dark,phone}.png.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
QUESTION = "Why can a Mixture-of-Experts model run on a device that is smaller than the model?"
VIEWS = {"light": (1440, 900, 1), "dark": (1440, 900, 1), "phone": (390, 844, 2)}
LIMIT_BYTES = 400_000


def main(options: list[str]) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium; install it with: sudo apt-get install chromium")
    command = [sys.executable, str(ROOT / "launch.py"), "--no-setup", "--no-browser", *options]
    app = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    found = next(filter(None, (re.search(r"is ready at (\S+)", line) for line in app.stdout)), None)
    if found is None:
        sys.exit("the application did not start, see above")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name in VIEWS:
                take(browser, found[1], name)
    finally:
        app.send_signal(signal.SIGINT)
        app.wait()


def take(browser: Browser, address: str, name: str) -> None:
    width, height, scale = VIEWS[name]
    context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page = context.new_page()
    page.goto(f"{address}/?__theme={'dark' if name == 'dark' else 'light'}")
    expect(page.locator(".memory .budget em")).to_have_text("in use", timeout=600_000)
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    answer = page.locator("#conversation .bot.message")
    expect(answer).to_have_text(re.compile(r"(\S+\s+){80}"), timeout=600_000)
    path = PICTURES / f"page-{name}.png"
    page.screenshot(path=path)
    context.close()
    assert path.stat().st_size < LIMIT_BYTES, f"{path} has {path.stat().st_size} bytes, wanted under {LIMIT_BYTES}"
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
