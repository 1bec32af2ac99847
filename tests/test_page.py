"""The page in a real browser: the real application, started as its users start it, on its own demo checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="no Playwright; install it with: pip install -r requirements-test.txt")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUESTION = "Why do such models offload so well?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium; install it with: sudo apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application, from its start to a clean end by Ctrl-C."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "--no-setup",
        "--port",
        str(port),
        "--link",
        "emulated:2GB/s",
        "--checkpoint",
        "demo-random-moe",
        "--vram",
        "50% of experts",
    ]  # its answers are long
    # One thread: on few cores, OpenMP threads that wait for each other and for the browser crawl.
    places = {"MOEPIC_HOME": str(home), "HF_HOME": str(home / "hf")}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1", "DISPLAY": ""}
    app = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert app.stdout is not None
    output = ""
    for line in app.stdout:
        output += line
        if "is ready at" in line:
            break
    found = re.search(r"is ready at (http://127\.0\.0\.1:\d+)", output)
    assert found, output
    assert "random weights: it produces noise" in output
    try:
        yield found[1]
    finally:
        app.send_signal(signal.SIGINT)
        output += app.communicate(timeout=20)[0]
    assert app.returncode == 0, output
    assert "Traceback" not in output, output


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What pages wrote to their console as an error, and whom else they asked for anything."""
    return []


@pytest.fixture(scope="module")
def open_page(browser: Browser, address: str, complaints: list[str]) -> Callable[..., Page]:
    def is_foreign(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    def open_page(width: int = 1440, height: int = 900, theme: str = "light") -> Page:
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url) else None)
        page.goto(f"{address}/?__theme={theme}")
        expect(page.locator("[data-live=status]")).to_have_text("ready", timeout=30_000)
        expect(page.locator(".memory .budget em")).to_have_text("in use", timeout=10_000)
        return page

    return open_page


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Page]) -> Page:
    """One page for all tests that can share it: opening one takes seconds here."""
    return open_page()


@pytest.fixture(autouse=True)
def no_complaints(complaints: list[str]) -> Iterator[None]:
    yield
    assert complaints == []


def ask(page: Page, question: str = QUESTION) -> Locator:
    """Sends a question; the answer's element, once it has words."""
    num_answers = page.locator("#conversation .bot.message").count()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    answer = page.locator("#conversation .bot.message").nth(num_answers)
    expect(answer).to_have_text(re.compile(r"\w+ \w+"), timeout=15_000)
    return answer


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("[data-live=status]")).to_have_text("ready")


def grows(page: Page, answer: Locator) -> None:
    words = len(answer.inner_text())
    page.wait_for_function(
        "([element, length]) => element.innerText.length > length", arg=[answer.element_handle(), words]
    )


def test_what_a_new_page_shows(page: Page) -> None:
    expect(page).to_have_title("MoEpic")
    expect(page.locator("[data-live=warning]")).to_have_text(
        "random weights: it produces noise, it shows how offloading works"
    )
    expect(page.locator("[data-live=link]")).to_have_text("emulated link 2 GB/s")
    expect(page.locator(".verdict")).to_contain_text("fits whole")
    expect(page.locator(".facts")).to_contain_text("qwen3_moe, 8 layers of 32 experts, 4 per token")
    expect(page.locator(".memory .reason")).to_contain_text("of 256 tops cached")
    for label in ("Message", "Link", "Strategy", "System prompt"):
        expect(page.get_by_label(label, exact=True)).to_be_visible()
    for name in ("Send", "Reload", "Switch between light and dark"):
        expect(page.get_by_role("button", name=name)).to_be_visible()


def test_an_answer_streams_and_figures_follow(page: Page) -> None:
    answer = ask(page)
    grows(page, answer)
    percent = dict.fromkeys(("hits", "partial", "misses", "overlap"), r"\d+ %")
    for key, pattern in {"speed": r"[\d.]+ tokens/s", "first": r"[\d.]+ s", "stall": r"[\d.]+ s", **percent}.items():
        expect(page.locator(f"[data-figure={key}]")).to_have_text(re.compile(f"^{pattern}$"))
    stop(page)


def test_stop_ends_the_answer_and_the_next_question_works(page: Page) -> None:
    answer = ask(page)
    stop(page)
    words = answer.inner_text()
    page.wait_for_timeout(400)
    assert answer.inner_text() == words
    ask(page, "And now?")
    stop(page)
    expect(page.locator("#conversation .user.message").last).to_have_text("And now?")


def test_leaving_the_page_stops_the_answer(page: Page, open_page: Callable[..., Page]) -> None:
    other = open_page()
    ask(other)
    expect(page.locator("[data-live=status]")).to_have_text("answering")
    other.context.close()
    expect(page.locator("[data-live=status]")).to_have_text("ready")


def budget(page: Page) -> str:
    return page.locator(".memory .budget b").inner_text()


def test_the_slider_changes_the_budget_while_the_model_answers(page: Page) -> None:
    answer, before = ask(page), budget(page)
    rail = page.locator("#slider input[type=range]").bounding_box()
    assert rail is not None
    y = rail["y"] + rail["height"] / 2
    page.mouse.move(rail["x"] + rail["width"] * 0.2, y)
    page.mouse.down()
    page.mouse.move(rail["x"] + rail["width"] * 0.9, y, steps=8)
    expect(page.locator(".memory .budget em")).to_have_text("release to apply")
    page.mouse.up()
    expect(page.locator(".memory .budget em")).to_have_text("in use")
    assert budget(page) != before
    expect(page.locator(".memory .reason")).to_contain_text("256 of 256 tops cached")
    grows(page, answer)
    stop(page)
    page.locator("#slider input[type=range]").focus()
    page.keyboard.press("Home")
    expect(page.locator(".memory .reason")).to_contain_text("no expert is cached")
    expect(page.locator(".memory .budget em")).to_have_text("in use")


def type_checkpoint(page: Page, name: str) -> None:
    picker = page.locator("#checkpoint input")
    picker.fill(name)
    picker.press("Enter")


def test_a_bad_checkpoint_costs_one_sentence(page: Page, tmp_path: Path) -> None:
    ask(page)
    stop(page)
    num_messages = page.locator("#conversation .message").count()
    type_checkpoint(page, str(tmp_path / "absent"))
    sentence = f"'{tmp_path / 'absent'}' is neither a folder nor a hub id"
    expect(page.locator(".verdict")).to_contain_text(sentence)
    page.get_by_role("button", name="Load", exact=True).click()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text(sentence)
    expect(page.locator("#conversation .message")).to_have_count(num_messages)
    notice.get_by_role("button", name="Dismiss this message").click()
    expect(notice).to_be_hidden()
    ask(page, "Still there?")
    stop(page)


def test_another_model_is_shown_in_every_tab(
    page: Page, open_page: Callable[..., Page], checkpoints: Callable[..., Path]
) -> None:
    other = open_page()
    folder = checkpoints("mixtral")
    type_checkpoint(page, str(folder))
    expect(page.locator(".facts")).to_contain_text("mixtral, 4 layers of 8 experts, 2 per token")
    expect(page.locator(".memory .budget em")).to_have_text("used when you load")
    page.get_by_label("Context (tokens)").fill("256")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Load", exact=True).click()
    for tab in (page, other):
        expect(tab.locator(".facts")).to_contain_text("mixtral")
        expect(tab.locator("#checkpoint input")).to_have_value(str(folder))
        expect(tab.get_by_role("button", name="Reload")).to_be_visible()
        expect(tab.locator("[data-live=warning]")).to_be_hidden()
    choose(page, "#strategy", "on-demand")
    expect(page.locator(".memory .reason")).to_contain_text("on-demand")
    choose(page, "#strategy", "moepic")
    page.get_by_label("Context (tokens)").fill("")
    choose(page, "#checkpoint", "Demo, comes with MoEpic")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(other.locator(".facts")).to_contain_text("15 M parameters", timeout=20_000)


def choose(page: Page, picker: str, option: str) -> None:
    page.locator(f"{picker} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_server_that_is_gone_is_noticed(page: Page) -> None:
    page.route("**/ui/live*", lambda route: route.fulfill(status=204))
    expect(page.locator("[data-live=status]")).to_have_text("server not reachable")
    page.unroute("**/ui/live*")
    expect(page.locator("[data-live=status]")).to_have_text("ready", timeout=10_000)


@pytest.mark.parametrize("size", [(1440, 900), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_scrolls_sideways(open_page: Callable[..., Page], size: tuple[int, int], theme: str) -> None:
    page = open_page(*size, theme)
    widest: Any = page.evaluate("document.documentElement.scrollWidth")
    assert widest <= size[0]
    assert page.evaluate("document.body.classList.contains('dark')") is (theme == "dark")
    expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()
