"""Answers that are cut off, in a real browser over the application as its users start it, with its random model.

Whatever ends, the tab, the page or the process, no finished message is lost, the growing one is kept up to the last
second, and the page comes back by itself and works on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.browser

from pages import EVIL, GONE, App, Pages  # noqa: E402
from playwright.sync_api import Locator, Page, expect  # noqa: E402

QUESTION = "What is a router?"
READY = ("ready", "answering")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App(tmp_path_factory.mktemp("home"), "--checkpoint", "demo-random-moe", "--link", "emulated:2GB/s")
    app.start()
    yield app
    app.end()


@pytest.fixture(scope="module")
def shared_page(pages: Pages, app: App) -> Page:
    return pages.open(app.address)


@pytest.fixture
def page(shared_page: Page) -> Page:
    """The one page, with a new chat."""
    expect(status(shared_page)).to_have_text("ready", timeout=90_000)
    shared_page.keyboard.press("Alt+n")
    expect(shared_page.locator("#conversation .message")).to_have_count(0)
    return shared_page


def status(page: Page) -> Locator:
    return page.locator("[data-live=status]")


def questions(page: Page) -> Locator:
    return page.locator("#conversation .user.message")


def answers(page: Page) -> Locator:
    return page.locator("#conversation .bot.message")


def note(page: Page) -> Locator:
    return page.locator(".under-message .note").last


def ask(page: Page, question: str) -> None:
    """Sends a question and waits until its answer has a few words."""
    num_answers = answers(page).count()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(num_answers + 1)
    expect(answers(page).last).to_have_text(re.compile(r"^\s*(?!Reading)(\w+\W+){4}"))


def stop(page: Page) -> None:
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(status(page)).to_have_text("ready")


def finished(page: Page) -> str:
    """A whole answer."""
    ask(page, QUESTION)
    stop(page)
    expect(note(page)).to_contain_text("stopped")
    return answers(page).inner_text()


def test_stop_is_quick_while_a_long_prompt_is_read(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill("experts " * 3000)
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Reading the prompt")
    begin_s = time.monotonic()
    stop(page)
    assert time.monotonic() - begin_s < 5
    expect(note(page)).to_have_text("stopped")
    assert answers(page).inner_text().strip() == ""


def test_a_second_tab_and_a_reload_in_the_middle_of_an_answer(page: Page, pages: Pages, app: App) -> None:
    whole = finished(page)
    ask(page, "And now?")
    other = pages.open(app.address, page.context)
    expect(questions(other)).to_have_text([QUESTION, "And now?"])
    expect(answers(other).last).to_contain_text(first_words(answers(page).last))
    expect(note(other)).to_have_text("being written")
    page.reload()
    expect(questions(page)).to_have_text([QUESTION, "And now?"])
    for tab in (page, other):
        expect(note(tab)).to_have_text("unfinished")
        assert answers(tab).first.inner_text() == whole
    assert answers(page).last.inner_text() == answers(other).last.inner_text()
    ask(other, "Still there?")
    stop(other)
    expect(questions(page)).to_have_count(3)
    other.close()
    pages.forgive(*GONE)


def first_words(answer: Locator) -> str:
    return " ".join(answer.inner_text().split()[:4])


@pytest.mark.parametrize("end", [App.kill, App.end], ids=["kill -9", "Ctrl-C"])
def test_the_application_ends_in_the_middle_of_an_answer(page: Page, pages: Pages, app: App, end: object) -> None:
    whole = finished(page)
    ask(page, "And now?")
    words = answers(page).last.inner_text()
    time.sleep(1)  # what is older than that is on disk
    assert callable(end)
    end(app)
    expect(status(page)).to_have_text("server not reachable")
    page.get_by_label("Message", exact=True).fill("typed meanwhile")
    app.start()
    expect(status(page)).to_have_text("ready", timeout=90_000)  # it comes back by itself
    expect(questions(page)).to_have_text([QUESTION, "And now?"])
    assert answers(page).first.inner_text() == whole
    assert answers(page).last.inner_text().startswith(words)
    expect(note(page)).to_have_text("unfinished" if end is App.kill else re.compile("stopped|unfinished"))
    expect(page.get_by_label("Message", exact=True)).to_have_value("typed meanwhile")
    page.get_by_role("button", name="Continue this answer").click()
    expect(answers(page).last).to_contain_text(first_words(answers(page).last))
    expect(status(page)).to_have_text("answering")
    stop(page)
    page.get_by_label("Message", exact=True).fill("")
    ask(page, "Still there?")
    stop(page)
    pages.forgive(*GONE)


def test_a_checkpoint_s_name_is_only_text(page: Page, app: App, pages: Pages) -> None:
    name = EVIL.replace("/", "_")
    (app.home / name).mkdir()
    for checkpoint, sentence in ((str(app.home / name), "has no config.json"), (EVIL, "is neither a folder nor")):
        picker = page.locator("#checkpoint input")
        picker.fill(checkpoint)
        picker.press("Enter")
        page.get_by_role("button", name="Load", exact=True).click()
        notice = page.get_by_role("alert").filter(has_text=sentence)
        expect(notice).to_contain_text("window.pwned")
        notice.get_by_role("button", name="Dismiss this message").click()
    assert page.evaluate("window.pwned") is None
    assert page.locator("[onerror], img[src=x]").count() == 0
    ask(page, QUESTION)
    stop(page)
