"""The chat in a real browser: everything that one does with messages and conversations.

The application runs around scripted answers; test_page_robust.py has the real ones, and what goes wrong.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

from pages import EVIL, GONE, Pages, served  # noqa: E402
from playwright.sync_api import BrowserContext, Locator, Page, expect  # noqa: E402

from app.conversation import Conversation, Message  # noqa: E402
from app.nouns import Answer  # noqa: E402
from app.state import State  # noqa: E402
from app.store import Store  # noqa: E402
from app.transcripts import to_json  # noqa: E402
from moepic_core.errors import OutOfRoom  # noqa: E402
from moepic_core.metrics import Reply  # noqa: E402
from moepic_core.spec import Settings  # noqa: E402

RICH = """<think>
First I think.
</think>
# Heading

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return x
```
The price is $5 and $10, the sum $x^2 + y^2$ and
\\[ \\int_0^1 x\\,dx \\]
"""
FIGURES = Reply(1, 7, 0, 7, 9, ttft_s=0.25, decode_s=0.4)


class Scripted(State):
    """A state whose model answers by what it is asked."""

    def reply(
        self, messages: Sequence[Any], *values: Any, stopped: Callable[[], bool], **more: Any
    ) -> Iterator[Answer]:
        question = messages[-1]["content"]
        yield Answer()
        if "crash" in question:
            yield Answer("Before the fall")
            raise OutOfRoom("memory ran out; lower the budget")
        if "prefill" in question:
            while not stopped():
                time.sleep(0.03)
                yield Answer(read_tokens=512, prompt_tokens=3000)
            yield Answer(reason="stopped")
            return
        text = {"rich": RICH, "evil": EVIL}.get(question.split()[0], f"An answer to {question}.")
        yield Answer(text)
        while ("long" in question or messages[-1]["role"] == "assistant") and not stopped():
            time.sleep(0.03)
            text += " word"
            yield Answer(text)
        yield Answer(text, reason="stopped" if stopped() else "stop", figures=FIGURES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("home") / "conversations", busy_s=0.1)
    yield store
    store.close()


@pytest.fixture(scope="module")
def address(store: Store) -> Iterator[str]:
    with served(Scripted(Settings.create(checkpoint="absent")), store=store) as address:
        yield address


@pytest.fixture(scope="module")
def context(pages: Pages) -> BrowserContext:
    return pages.context()


@pytest.fixture(scope="module")
def shared_page(pages: Pages, context: BrowserContext, address: str) -> Page:
    page = pages.open(address, context)
    page.get_by_role("button", name="Conversations and answer settings").click()
    return page


@pytest.fixture
def page(shared_page: Page) -> Page:
    """The one page of most tests, with a new chat and a list that shows everything."""
    shared_page.get_by_label("Search conversations").fill("")
    new_chat(shared_page)
    return shared_page


def questions(page: Page) -> Locator:
    return page.locator("#conversation .user.message")


def answers(page: Page) -> Locator:
    return page.locator("#conversation .bot.message")


def notes(page: Page) -> Locator:
    return page.locator(".under-message .note")


def titles(page: Page) -> Locator:
    return page.locator(".talks .title")


def stop_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Stop", exact=True)


def new_chat(page: Page) -> None:
    """What is asked next goes to a new chat even sooner, but counts of what is shown wait for the old one to go."""
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#conversation .message")).to_have_count(0)


def ask(page: Page, question: str) -> None:
    """Asks and waits until the answer is complete, or is growing if it has no end."""
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(questions(page).last).to_have_text(question)
    if "long" in question:
        expect(answers(page).last).to_contain_text("word word")
    else:
        expect(page.locator("#conversation .message-buttons").last.locator(".note")).to_be_visible()
        expect(stop_button(page)).to_have_count(0)


def stop(page: Page) -> None:
    page.keyboard.press("Escape")
    expect(stop_button(page)).to_have_count(0)


def act(page: Page, title: str, action: str) -> None:
    """An entry of the menu of a conversation in the list."""
    line = page.locator(".talks li", has_text=title).first
    line.locator("summary").click()
    line.get_by_text(action, exact=True).click()


def upload(page: Page, name: str, text: str) -> None:
    page.locator(".talks input[type=file]").set_input_files(
        {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
    )


def test_stop_continue_and_what_stands_under_an_answer(page: Page) -> None:
    ask(page, "a long one")
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_focused()
    message.fill("typed ahead")
    page.keyboard.press("Enter")
    stop(page)
    expect(message).to_have_value("typed ahead")
    expect(questions(page)).to_have_count(1)
    message.fill("")
    expect(notes(page)).to_have_text("20.0 tokens/s · first token 0.25 s · 9 tokens · stopped")
    before = answers(page).inner_text()
    page.wait_for_timeout(200)
    assert answers(page).inner_text() == before
    page.get_by_role("button", name="Continue this answer").click()
    expect(answers(page)).to_contain_text(f"{before}An answer to")
    expect(answers(page)).to_contain_text("word word word")
    stop(page)
    expect(answers(page)).to_have_count(1)


def test_a_long_prompt_says_how_far_it_is_and_stops(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill("prefill")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Reading the prompt: 512 of 3000 tokens")
    stop(page)
    expect(notes(page)).to_have_text("stopped")


def test_an_answer_that_fails_says_why_and_one_goes_on(page: Page) -> None:
    ask(page, "crash")
    expect(answers(page)).to_have_text("Before the fall")
    expect(page.locator(".under-message .failed")).to_have_text("memory ran out; lower the budget")
    expect(page.get_by_role("alert").filter(has_text="memory ran out")).to_be_visible()
    ask(page, "and afterwards")
    expect(answers(page)).to_have_text(["Before the fall", "An answer to and afterwards."])
    expect(page.get_by_role("alert").filter(has_text="memory ran out")).to_have_count(0)


def test_a_new_question_is_seen_wherever_one_had_scrolled_to(page: Page) -> None:
    for count in range(4):
        ask(page, f"rich {count}")
    # Again until it stays: the last update of the answer before scrolls down once more.
    stays = """() => {
      const chat = document.querySelector("#conversation .bubble-wrap"), was = chat.scrollTop;
      chat.scrollTo(0, 0);
      return was === 0;
    }"""
    page.wait_for_function(stays, polling=400)
    expect(questions(page).first).to_be_in_viewport()
    ask(page, "the newest")
    expect(answers(page).last).to_be_in_viewport()
    expect(questions(page).first).not_to_be_in_viewport()


def test_versions_edit_undo_and_branch(page: Page) -> None:
    ask(page, "first")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".under-message .place")).to_have_text("2/2")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".under-message .place")).to_have_text("1/2")
    page.get_by_role("button", name="Edit").click()
    page.locator("#conversation textarea").fill("edited")
    page.get_by_role("button", name="Submit").click()
    expect(questions(page)).to_have_text(["edited"])
    expect(answers(page)).to_have_text(["An answer to edited."])
    expect(stop_button(page)).to_have_count(0)
    ask(page, "second")
    page.get_by_role("button", name="Branch from here into a new conversation").nth(1).click()
    expect(questions(page)).to_have_text(["edited"])
    expect(titles(page).first).to_have_text("first (branch)")
    page.get_by_role("button", name="Undo", exact=True).last.click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("edited")
    expect(page.locator("#conversation .message")).to_have_count(0)
    page.get_by_label("Message", exact=True).fill("")


def test_markdown_code_formulas_and_reasoning(page: Page) -> None:
    ask(page, "rich")
    answer = answers(page).first
    expect(answer.locator("h1")).to_have_text("Heading")
    expect(answer.locator("td").first).to_have_text("1")
    expect(answer.locator("pre code span").first).to_be_visible()
    expect(answer.locator("span.katex")).to_have_count(2)
    expect(answer).to_contain_text("The price is $5 and $10")
    expect(answer).to_contain_text("Reasoning")
    expect(answer.get_by_text("First I think.")).to_be_hidden()
    answer.get_by_text("Reasoning").click()
    expect(answer.get_by_text("First I think.")).to_be_visible()


def test_the_list_searches_renames_deletes_and_restores(page: Page) -> None:
    ask(page, "about giraffes")
    new_chat(page)
    ask(page, "about zebras")
    search = page.get_by_label("Search conversations")
    search.fill("GIRAFFES.")
    expect(titles(page)).to_have_text(["about giraffes"])
    expect(page.locator(".talks .excerpt")).to_have_text("An answer to about giraffes.")
    act(page, "giraffes", "Rename")
    page.get_by_label("Title of the conversation").fill("Tall animals")
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text(["Tall animals"])
    titles(page).click()
    expect(questions(page)).to_have_text(["about giraffes"])
    act(page, "Tall", "Delete")
    expect(page.locator(".talks .undo")).to_contain_text("“Tall animals” is deleted")
    expect(page.locator("#conversation .message")).to_have_count(0)
    expect(page.locator(".talks .none")).to_have_text("Nothing found")
    page.locator(".talks .undo button").click()
    expect(titles(page)).to_have_text(["Tall animals"])
    search.fill("nowhere to be found")
    expect(titles(page)).to_have_count(0)


def test_export_and_import(page: Page, tmp_path: Path) -> None:
    ask(page, "something to keep")
    expect(titles(page).first).to_have_text("something to keep")
    num_titles = titles(page).count()
    for kind, name in (("JSON", "something-to-keep.json"), ("Markdown", "something-to-keep.md")):
        with page.expect_download() as download:
            act(page, "something to keep", f"Export as {kind}")
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        page.locator(".talks input[type=file]").set_input_files(tmp_path / name)
        expect(page.locator(".talks .undo")).to_contain_text("One conversation is imported")
        expect(answers(page)).to_have_text(["An answer to something to keep."])
    assert json.loads((tmp_path / "something-to-keep.json").read_text())["format"] == "moepic-conversations"
    upload(page, "bad.md", "just words")
    expect(page.locator(".talks .undo")).to_contain_text("bad.md holds no messages")
    expect(titles(page)).to_have_count(num_titles + 2)


def test_nothing_of_others_is_run(page: Page, pages: Pages) -> None:
    """Text of the model, titles, names of files and imported conversations that try to become part of the page."""
    ask(page, "evil")
    expect(answers(page)).to_contain_text("bold")
    act(page, "evil", "Rename")
    page.get_by_label("Title of the conversation").fill(EVIL[:60])
    page.keyboard.press("Enter")
    expect(titles(page).first).to_have_text(EVIL[:60])
    upload(page, f"{EVIL[:35]}.md", "just words")
    expect(page.locator(".talks .undo")).to_contain_text("holds no messages")
    upload(
        page,
        "evil.md",
        f"# {EVIL}\n## System prompt\n{EVIL}\n## User\n{EVIL}\n## Assistant\n<think>{EVIL}</think>{EVIL}",
    )
    expect(page.get_by_label("System prompt")).to_have_value(EVIL)
    expect(questions(page)).to_contain_text("bold")
    harmless(page, pages)
    figures = {"error": EVIL, "tokens_per_s": 1.5}
    messages = (Message(1, None, "user", EVIL, 1.0), Message(2, 1, "assistant", EVIL, 1.0, "error", figures))
    settings = {"system": EVIL, "checkpoint": EVIL}
    upload(page, "evil.json", to_json([Conversation("", EVIL, 1.0, 2.0, 0, settings, 2, messages)]))
    expect(page.locator(".under-message .failed")).to_contain_text("onerror")
    harmless(page, pages)
    page.get_by_label("System prompt").fill("")


def harmless(page: Page, pages: Pages) -> None:
    """Nothing of EVIL has become part of the page."""
    for link in page.locator("#conversation a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript")
    assert page.locator("#conversation :is(script, [onerror])").count() == 0
    assert page.locator("#conversations img").count() == 0
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    pages.forgive(".*404")  # the picture itself may be asked for, of us


def test_settings_belong_to_the_conversation(page: Page) -> None:
    page.locator("#sampling button").first.click()
    page.get_by_role("radio", name="Creative").click()
    temperature = page.locator("#sampling input[type=range]").first
    expect(temperature).to_have_value("1.1")
    page.get_by_label("System prompt").fill("Be odd.")
    ask(page, "creative question")
    new_chat(page)
    expect(temperature).to_have_value("1.1")  # as with this checkpoint last time
    page.get_by_role("button", name="Reset to the checkpoint's own").click()
    expect(temperature).to_have_value("0.7")
    expect(page.get_by_role("radio", name="Balanced")).to_be_checked()
    page.get_by_label("System prompt").fill("")
    new_chat(page)
    ask(page, "plain question")
    page.locator(".talks .open", has_text="creative question").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be odd.")
    expect(temperature).to_have_value("1.1")
    expect(page.get_by_role("radio", name="Creative")).to_be_checked()
    page.locator(".talks .open", has_text="plain question").click()
    expect(page.get_by_label("System prompt")).to_have_value("")
    page.locator("#sampling button").first.click()


def test_a_second_tab_follows_and_a_reload_keeps_everything(
    page: Page, context: BrowserContext, address: str, pages: Pages
) -> None:
    ask(page, "a long story")
    other = pages.open(address, context)
    expect(questions(other)).to_have_text(["a long story"])
    expect(answers(other)).to_contain_text("word")
    words = len(answers(other).inner_text())
    length = "document.querySelector('#conversation .bot.message').innerText.length"
    other.wait_for_function(f"before => {length} > before + 20", arg=words)
    expect(notes(other)).to_have_text("being written")
    page.reload()
    expect(answers(page)).to_contain_text("word word")
    expect(notes(page)).to_have_text("unfinished")
    expect(notes(other)).to_have_text("unfinished")
    assert other.locator("#conversation .bot.message").inner_text() == answers(page).inner_text()
    ask(page, "and now")
    expect(questions(other)).to_have_text(["a long story", "and now"])
    page.get_by_label("Message", exact=True).fill("a draft")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("a draft")
    expect(notes(page).last).to_have_text("20.0 tokens/s · first token 0.25 s · 9 tokens")
    page.get_by_label("Message", exact=True).fill("")
    ask(other, "another long one")
    other.close()
    expect(answers(page)).to_have_count(3)
    expect(notes(page).last).to_have_text("unfinished")
    pages.forgive(*GONE)


def test_the_keyboard_and_names_for_screen_readers(page: Page) -> None:
    ask(page, "keys")
    page.keyboard.press("?")
    expect(page.get_by_label("Message", exact=True)).to_have_value("?")  # while one writes it is a letter
    page.get_by_label("Message", exact=True).fill("")
    page.keyboard.press("Alt+k")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.press("Alt+m")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Alt+l")
    expect(page.get_by_role("button", name="Conversations and answer settings")).to_have_attribute(
        "aria-expanded", "false"
    )
    page.locator("#conversation").click(position={"x": 5, "y": 300})
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_contain_text("stop the answer")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Alt+l")
    page.keyboard.press("Alt+n")
    expect(page.locator("#conversation .message")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    nameless = page.evaluate("""[...document.querySelectorAll("#side :is(button, a, input, textarea, summary)")]
        .filter(e => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.title || e.labels?.length
                     || e.getAttribute("aria-labelledby"))).map(e => e.outerHTML)""")
    assert nameless == []


def test_when_the_file_makes_trouble_one_chats_on(page: Page, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(page, "before the trouble")
    database = store._db
    with monkeypatch.context() as patch:
        patch.setattr(database, "_open", no_room)
        database._db.execute(f"PRAGMA max_page_count = {database._db.execute('PRAGMA page_count').fetchone()[0]}")
        ask(page, "with a full disk " + "x" * 20_000)
        expect(page.locator(".talks .unsaved")).to_contain_text("conversations are not being saved: the disk is full")
        expect(questions(page)).to_have_count(2)
    monkeypatch.setattr("app.database.RETRY_S", 0.0)
    ask(page, "afterwards")
    expect(page.locator(".talks .unsaved")).to_be_hidden()
    assert store.problem is None


def no_room(_: Path) -> sqlite3.Connection:
    raise OSError("no room")


def test_on_a_phone(pages: Pages, address: str) -> None:
    page = pages.open(address, pages.context(390, 844, has_touch=True))
    toggle = page.get_by_role("button", name="Conversations and answer settings")
    expect(page.get_by_role("button", name="New chat")).not_to_be_in_viewport()
    toggle.click()
    page.locator(".talks .open", has_text="keys").first.click()
    expect(questions(page)).to_have_text(["keys"])
    expect(page.get_by_role("button", name="New chat")).not_to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()
