"""What happens to a conversation when it is asked, answered, stopped, cut off, continued and edited. No engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app import talk as talk_module
from app import transcripts
from app.conversation_routes import add_routes
from app.nouns import Answer, Look
from app.settings_store import SettingsStore
from app.store import Store
from app.talk import Talk
from moepic_core.errors import BadSettings
from moepic_core.metrics import Reply
from moepic_core.spec import Settings

SETTINGS = {"system": "Be brief.", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}
FIGURES = Reply(1, 7, 0, 7, 3, ttft_s=0.5, decode_s=0.2)
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


class FakeState:
    """Answers with `texts`, one after another, and remembers what it was asked."""

    def __init__(self, *texts: str, error: Exception | None = None) -> None:
        self.texts, self.error = texts, error
        self.settings = Settings("absent", device="cpu")
        self.kept = SettingsStore(given={"device": "cpu"})
        self.asked: list[Any] = []
        self.told: list[str] = []

    def look(self) -> Look:
        return Look(0, None, None, None, None)

    def clear_notice(self) -> None:
        self.told.clear()

    def tell(self, kind: str, text: str) -> None:
        self.told.append(text)

    def reply(self, messages: Sequence[Any], *, stopped: Any, **sampling: Any) -> Iterator[Answer]:
        self.asked.append((list(messages), sampling))
        yield Answer(waits="another answer to be complete")
        yield Answer(read_tokens=3, prompt_tokens=7)
        for place in range(1, len(self.texts) + 1):
            yield Answer("".join(self.texts[:place]), read_tokens=7, prompt_tokens=7)
            if stopped():
                yield Answer("".join(self.texts[:place]), reason="stopped", figures=FIGURES)
                return
        if self.error is not None:
            raise self.error
        yield Answer("".join(self.texts), reason="stop", figures=FIGURES)


@pytest.fixture(autouse=True)
def every_update_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk_module, "DRAW_S", 0.0)


def make(*texts: str, error: Exception | None = None) -> Talk:
    return Talk(Store(), FakeState(*texts, error=error))  # type: ignore[arg-type]


def ask(talk: Talk, text: str = "Why?", beside: str = "{}") -> str:
    """Asks and waits for the answer; what the panel beside knows then."""
    beside = talk.send(text, beside, SETTINGS)[2]
    return last(talk.answer(beside, SETTINGS, threading.Event()))


def last(views: Iterator[tuple[Any, str | None]]) -> str:
    *_, (_, beside) = views
    assert beside is not None
    return beside


def texts(talk: Talk, beside: str) -> list[str]:
    conversation = talk.store.get(json.loads(beside)["id"])
    assert conversation is not None
    return [message.text for message in conversation.path]


def notes(beside: str) -> list[str]:
    return [row["note"] for row in json.loads(beside)["rows"]]


def said(window: list[dict[str, Any]]) -> list[str]:
    return [(entry["metadata"] or {}).get("title") or entry["content"][0]["text"] for entry in window]


def test_an_answer_as_it_is_seen_and_kept() -> None:
    talk = make("Be", "cause.")
    left, window, beside = talk.send("Why?", "{}", SETTINGS)
    assert (left, said(window)) == ("", ["Why?"])
    views = list(talk.answer(beside, SETTINGS, threading.Event()))
    assert [said(window)[1:] for window, _ in views] == [
        ["Waiting for another answer to be complete"],
        ["Reading the prompt: 3 of 7 tokens"],
        ["Be"],
        ["Because."],
        ["Because."],
        ["Because."],
    ]
    assert [beside for _, beside in views[:-1]] == [None] * 5
    assert notes(views[-1][1] or "") == ["", "10.0 tokens/s · first token 0.50 s · 3 tokens"]
    assert talk.state.asked == [  # type: ignore[attr-defined]
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
         {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}),
    ]  # fmt: skip
    conversation = talk.store.get(json.loads(beside)["id"])
    assert conversation is not None
    assert (conversation.title, conversation.settings) == ("Why?", {**SETTINGS, "checkpoint": None})


@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_is_not_sent(text: str) -> None:
    talk = make("x")
    left, window, beside = talk.send(text, "{}", SETTINGS)
    assert (left, window, json.loads(beside)["id"]) == (text, [], None)
    assert list(talk.answer(beside, SETTINGS, threading.Event())) == []
    assert talk.store.entries() == []


def test_a_growing_answer_is_on_disk_and_a_closed_tab_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk_module, "SAVE_S", 0.0)
    talk = make("one ", "two ", "three")
    beside = talk.send("Count", "{}", SETTINGS)[2]
    answer = talk.answer(beside, SETTINGS, threading.Event())
    for _ in range(5):
        next(answer)
    assert texts(talk, beside)[-1] == "one two "  # what was shown before the last step is written down
    assert notes(talk.view(json.loads(beside)["id"])[1])[-1] == "being written"
    answer.close()  # type: ignore[attr-defined]
    assert texts(talk, beside)[-1] == "one two three"
    _, beside = talk.view(json.loads(beside)["id"])
    assert notes(beside)[-1] == "unfinished"
    assert json.loads(beside)["rows"][-1]["continues"]


def test_below_a_long_conversation_an_answer_is_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make(*(f"{count} " for count in range(30)))
    beside = talk.send("Count", "{}", SETTINGS)[2]
    assert len(list(talk.answer(beside, SETTINGS, threading.Event()))) == 34
    monkeypatch.setattr(talk_module, "DRAW_S", 60.0)
    beside = talk.send("And again", beside, SETTINGS)[2]
    (view,) = talk.answer(beside, SETTINGS, threading.Event())
    assert said(view[0])[-1] == said(view[0])[-3] == "".join(talk.state.texts)  # type: ignore[attr-defined]


def test_stop_keeps_what_there_is_and_the_next_question_works() -> None:
    talk = make("one ", "two ")
    beside = talk.send("Count", "{}", SETTINGS)[2]
    stop = threading.Event()
    stop.set()
    beside = last(talk.answer(beside, SETTINGS, stop))
    assert texts(talk, beside) == ["Count", "one "]
    assert notes(beside)[-1].endswith("stopped")
    beside = ask(talk, "And now?", beside)
    assert texts(talk, beside) == ["Count", "one ", "And now?", "one two "]
    assert len(talk.store.entries()) == 1


def test_an_error_is_one_sentence_under_the_message() -> None:
    talk = make("one ", error=BadSettings("the prompt is too long; shorten it"))
    beside = ask(talk)
    assert [row["failed"] for row in json.loads(beside)["rows"]] == [False, True]
    assert texts(talk, beside) == ["Why?", "one "]
    assert notes(beside) == ["", "the prompt is too long; shorten it"]
    assert talk.state.told == ["the prompt is too long; shorten it"]  # type: ignore[attr-defined]


def test_what_goes_to_the_panel_beside_has_no_html() -> None:
    beside = ask(make(error=BadSettings(EVIL)))
    assert "<" not in beside
    assert notes(beside) == ["", EVIL]


def test_a_mistake_of_ours_keeps_the_words_as_well() -> None:
    talk = make("one ", error=ValueError("our mistake"))
    beside = talk.send("Why?", "{}", SETTINGS)[2]
    with pytest.raises(ValueError, match="our mistake"):
        list(talk.answer(beside, SETTINGS, threading.Event()))
    assert texts(talk, beside) == ["Why?", "one "]
    assert talk.growing == set()


def test_continue_appends_to_the_last_answer() -> None:
    talk = make("one ", "two ")
    beside = ask(talk, "Count")
    talk.state.texts = (" three",)  # type: ignore[attr-defined]
    beside = last(talk.go_on(beside, SETTINGS, threading.Event()))
    assert texts(talk, beside) == ["Count", "one two three"]
    assert talk.state.asked[-1][0][-1] == {"role": "assistant", "content": "one two"}  # type: ignore[attr-defined]


def test_retry_keeps_the_old_answer_as_a_version() -> None:
    talk = make("first")
    beside = ask(talk)
    talk.state.texts = ("second",)  # type: ignore[attr-defined]
    window, beside = talk.retry(beside)
    assert said(window) == ["Why?"]
    beside = last(talk.answer(beside, SETTINGS, threading.Event()))
    assert texts(talk, beside) == ["Why?", "second"]
    assert json.loads(beside)["rows"][1]["versions"] == [2, 3]
    id = json.loads(beside)["id"]
    assert talk.choose(id, 2, False) == id
    assert texts(talk, beside) == ["Why?", "first"]
    assert talk.retry("{}") == talk.view(None)


def test_edit_opens_a_new_branch_and_undo_takes_back() -> None:
    talk = make("answer")
    beside = ask(talk, "second", ask(talk, "first"))
    assert talk.edit(beside, 0, "first") == talk.view(json.loads(beside)["id"])  # nothing is new
    assert list(talk.answer(beside, SETTINGS, threading.Event())) == []
    assert talk.edit(beside, 9, "x") == talk.edit(beside, 1, "x") == talk.view(json.loads(beside)["id"])
    window, beside = talk.edit(beside, 0, "edited")
    assert said(window) == ["edited"]
    beside = last(talk.answer(beside, SETTINGS, threading.Event()))
    assert texts(talk, beside) == ["edited", "answer"]
    text, window, beside = talk.undo(beside)
    assert (text, window) == ("edited", [])
    assert talk.undo(beside)[:2] == ("", [])
    talk.choose(json.loads(beside)["id"], 1, False)
    assert texts(talk, beside) == ["first", "answer", "second", "answer"]


def test_branch_makes_a_conversation_of_its_own() -> None:
    talk = make("answer")
    beside = ask(talk, "second", ask(talk, "first"))
    id = json.loads(beside)["id"]
    new = talk.choose(id, 2, True)
    assert new not in (None, id)
    assert said(talk.view(new)[0]) == ["first", "answer"]
    assert said(talk.view(id)[0]) == ["first", "answer", "second", "answer"]
    assert talk.store.entries()[0].title == "first (branch)"


@pytest.mark.parametrize("id", [None, "nobody", 7, ["x"], {"id": 1}])
@pytest.mark.parametrize("number", [None, 1, "1", -1, [1]])
def test_a_page_may_ask_for_anything(id: Any, number: Any) -> None:
    talk = make("x")
    assert talk.choose(id, number, True) is None
    assert talk.view(id if isinstance(id, str) else None)[0] == []
    for value in ("", "[]", "nonsense", json.dumps({"id": id})):
        assert talk_module.opened_id(value) in (None, "nobody")


def test_a_question_to_a_conversation_that_is_gone_begins_a_new_one() -> None:
    talk = make("x")
    beside = ask(talk)
    talk.store.delete(json.loads(beside)["id"])
    beside = ask(talk, "Still there?", beside)
    assert texts(talk, beside) == ["Still there?", "x"]


# ---- our own routes ----


@pytest.fixture
def client() -> TestClient:
    app, store = FastAPI(), Store()
    add_routes(app, store)
    client = TestClient(app)
    client.store = store  # type: ignore[attr-defined]
    return client


def test_routes(client: TestClient) -> None:
    talk = Talk(client.store, FakeState("answer"))  # type: ignore[attr-defined, arg-type]
    id = json.loads(ask(talk, EVIL))["id"]
    found = client.get("/ui/conversations", params={"opened": id}).json()
    assert (found["problem"], found["entries"][0]["title"]) == (None, EVIL)
    assert found["opened"] == found["entries"][0]["changed"] <= found["version"]
    assert client.get("/ui/conversations", params={"search": "nowhere", "opened": "x"}).json()["entries"] == []
    assert client.patch(f"/ui/conversations/{id}", json={"title": "Named"}).status_code == 204
    refusal = client.patch(f"/ui/conversations/{id}", json={"title": " "})
    assert "needs a title" in refusal.json()["error"]
    for kind in ("json", "md"):
        answer = client.get(f"/ui/conversations/{id}/{kind}")
        assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''Named.{kind}"
        assert "html" not in answer.headers["content-type"]
        ids = client.post("/ui/conversations", params={"name": f"x.{kind}"}, content=answer.content).json()["ids"]
        assert said(talk.view(ids[0])[0]) == [EVIL, "answer"]
    assert client.get(f"/ui/conversations/{id}/exe").status_code == 404
    assert len(json.loads(client.get("/ui/conversations.json").text)["conversations"]) == 3
    assert client.delete(f"/ui/conversations/{id}").status_code == 204
    assert len(client.get("/ui/conversations").json()["entries"]) == 2
    assert client.post(f"/ui/conversations/{id}/restore").status_code == 204
    assert len(client.get("/ui/conversations").json()["entries"]) == 3


def test_an_import_that_is_too_large_or_wrong(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = client.post("/ui/conversations", params={"name": EVIL}, content=b"words")
    assert refusal.headers["content-type"] == "application/json"
    assert "holds no messages" in refusal.json()["error"]
    monkeypatch.setattr(transcripts, "LIMIT_BYTES", 1000)
    refusal = client.post("/ui/conversations", params={"name": "a.md"}, content=b"## User\n" + b"x" * 5000)
    assert "allowed are 1,000" in refusal.json()["error"]
    assert client.get("/ui/conversations").json()["entries"] == []
