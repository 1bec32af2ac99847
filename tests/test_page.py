"""The page in a real browser: the real application around its own random checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.browser

from pages import Pages, served  # noqa: E402
from playwright.sync_api import Locator, Page, expect  # noqa: E402

from app.state import State  # noqa: E402
from moepic_core.spec import Settings  # noqa: E402

QUESTION = "Why do such models offload so well?"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    """With a random model, whose answers are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        settings = Settings("demo-random-moe", vram="50% of experts", device="cpu", link="emulated:2GB/s")
        yield State(settings)


@pytest.fixture(scope="module")
def address(pages: Pages, state: State) -> Iterator[str]:
    with served(state) as address:
        state.load(state.settings)
        yield address


@pytest.fixture(scope="module")
def open_page(pages: Pages, address: str) -> Callable[..., Page]:
    def open_page(width: int = 1440, height: int = 900, theme: str = "light") -> Page:
        page = pages.open(address, pages.context(width, height), theme)
        expect(page.locator("[data-live=status]")).to_have_text("ready")
        expect(page.locator(".memory .budget em")).to_have_text("in use")
        return page

    return open_page


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Page]) -> Page:
    """One page for all tests that can share it: opening one takes seconds here."""
    return open_page()


def ask(page: Page, question: str = QUESTION) -> Locator:
    """Sends a question; the answer's element, once it has words."""
    num_answers = page.locator("#conversation .bot.message").count()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    answer = page.locator("#conversation .bot.message").nth(num_answers)
    expect(answer).to_have_text(re.compile(r"\w+ \w+"))
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
    expect(page.locator("#card .verdict")).to_contain_text("fits whole")
    for label in ("Message", "System prompt"):
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
    expect(page.locator(".memory .budget b")).not_to_have_text(before)
    grows(page, answer)
    stop(page)


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
    expect(page.locator("#card .verdict")).to_contain_text(sentence)
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
    type_checkpoint(page, str(checkpoints("mixtral")))
    page.get_by_role("button", name="Load", exact=True).click()
    for tab in (page, other):
        expect(tab.locator("#card")).to_contain_text("mixtral")
        expect(tab.get_by_role("button", name="Reload")).to_be_visible()
        expect(tab.locator("[data-live=warning]")).to_be_hidden()
    type_checkpoint(page, "demo-random-moe")
    page.get_by_role("button", name="Load", exact=True).click()
    for tab in (page, other):
        expect(tab.locator("[data-live=warning]")).to_be_visible()
    expect(page.locator("[data-live=status]")).to_have_text("ready")
    other.context.close()


FAULTS = {
    "a lost GPU": (torch.AcceleratorError("CUDA error: device lost\nand more"), "the GPU stopped working (CUDA error"),
    "no memory": (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_costs_one_sentence(page: Page, state: State, fault: str) -> None:
    error, sentence = FAULTS[fault]
    engine = state._engine
    assert engine is not None
    before = budget(page)
    answer = ask(page)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.hf, "forward", fails(error))
        expect(page.locator(".under-message .failed").last).to_contain_text(sentence)
        expect(page.get_by_role("alert").filter(has_text=sentence)).to_be_visible()
    words = answer.inner_text()
    assert words
    ask(page, "Still there?")
    stop(page)
    expect(page.get_by_role("alert").filter(has_text=sentence)).to_be_hidden()
    assert answer.inner_text() == words
    assert (budget(page) == before) is (fault != "no memory")  # of which a tenth was given back before that


def fails(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_a_server_that_is_gone_is_noticed(page: Page) -> None:
    page.route("**/ui/live*", lambda route: route.fulfill(status=204))
    expect(page.locator("[data-live=status]")).to_have_text("server not reachable")
    page.unroute("**/ui/live*")
    expect(page.locator("[data-live=status]")).to_have_text("ready")


def test_nothing_scrolls_sideways(page: Page) -> None:
    for theme in ("dark", "light"):
        page.get_by_role("button", name="Switch between light and dark").click()
        for width, height in ((390, 844), (1440, 900)):
            page.set_viewport_size({"width": width, "height": height})
            widest: Any = page.evaluate("document.documentElement.scrollWidth")
            assert widest <= width
            assert page.evaluate("document.body.classList.contains('dark')") is (theme == "dark")
            expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()
