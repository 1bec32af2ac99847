"""What the browser tests share: Chromium, watched pages, and the application as its users start it.

A watched page may not write an error to its console nor ask anybody but its own server for anything; the fixtures
`pages` and `no_complaints` of `conftest` see to it after every test. What a test provokes on purpose it names with
`forgive`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="no Playwright; install it with: pip install -r requirements-test.txt")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from app.main import Server, build_app
from app.state import State

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 30_000
EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>[link](javascript:window.pwned=3)<b>bold</b>'
# What a browser itself writes to the console, and Gradio's client, when the server goes away or is left mid-answer.
GONE = (
    r"Failed to load resource: net::ERR_",
    r"TypeError: network error",
    # Gradio 6.31's client, in the page that is being left: what the server sends waits for a timer while the page is
    # visible (`setTimeout(n, 0, s)` in `open_stream`) and is handled at once when it is hidden, as it is while it is
    # left. So an update can overtake the first message of its answer; its edits are then taken for the window itself,
    # and the next edit looks for a message in a list of edits. Nobody sees that page any more, and nothing of ours
    # runs between the two.
    r"Unexpected client exception TypeError: Cannot read properties of undefined \(reading 'content'\)",
    r"AbortError",
    r"Unexpected error Connection errored",
    r".*BodyStreamBuffer",
)


@dataclass
class Pages:
    """Opens pages that are watched."""

    browser: Browser
    complaints: list[str] = field(default_factory=list)  # errors on consoles, and requests to others

    def context(self, width: int = 1440, height: int = 900, **options: Any) -> BrowserContext:
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE_MS)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        context.on("request", lambda request: self.complaints.append(request.url) if _is_foreign(request.url) else None)
        return context

    def open(self, address: str, context: BrowserContext | None = None, theme: str = "light") -> Page:
        """A page that has heard from its server; in a context of its own unless one is given."""
        page = (context or self.context()).new_page()
        page.goto(f"{address}/?__theme={theme}")
        expect(page.locator(".talks ul, .talks .none").first).to_be_attached()
        expect(page.locator("[data-live=status]")).not_to_have_text("connecting …")
        return page

    def forgive(self, *patterns: str) -> None:
        self.complaints[:] = [text for text in self.complaints if not any(re.match(each, text) for each in patterns)]

    def close(self) -> None:
        """Leaves nothing open that would go on asking a server that has gone."""
        for context in self.browser.contexts:
            context.close()

    def check(self) -> None:
        found, self.complaints = self.complaints, []
        assert not found, "\n".join(found)


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the tests where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium; install it with: sudo apt-get install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def served(state: State, **parts: Any) -> Iterator[str]:
    """The address of the application around `state`, in this process; `parts` go to `build_app`."""
    ready, port = threading.Event(), free_port()
    server = Server(build_app(state, **parts), state, "127.0.0.1", port, lambda _: ready.set())
    thread = threading.Thread(target=server.run, name="page")
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    state.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class App:
    """launch.py in a process of its own, with a home of its own; it can be started again at the same address."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        return (self.home / "output.txt").read_text()

    def start(self) -> None:
        """Returns when it answers; its model may still be on its way."""
        launch = [sys.executable, str(ROOT / "launch.py"), "--no-setup", "--port", str(self.port), *self.options]
        # One thread: on few cores, OpenMP threads that wait for each other and for the browser crawl.
        places = {"MOEPIC_HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "DISPLAY": ""}
        environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
        with (self.home / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(launch, cwd=self.home, env=environment, stdout=output, stderr=output)
        end_s = time.monotonic() + 120
        while f"is ready at {self.address}" not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end_s, self.output
            time.sleep(0.05)

    def end(self) -> None:
        """By Ctrl-C, as users do."""
        self._signal(signal.SIGINT)
        assert self.process is not None
        assert self.process.returncode == 0, self.output
        assert "Traceback" not in self.output, self.output

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=30)
