"""What the model reads of a conversation, what the chat shows of it, and conversations as files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import conversation, transcripts
from app.conversation import Conversation, Message
from app.transcripts import BadTranscript

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def talk(*turns: tuple[str, str], **values: Any) -> Conversation:
    """A conversation without branches of (role, text)."""
    messages = tuple(
        Message(place, place - 1 or None, role, text, 1.0)  # type: ignore[arg-type]
        for place, (role, text) in enumerate(turns, 1)
    )
    return Conversation("id", "Title", 1.0, 2.0, 3, {}, len(messages) or None, messages, **values)


@pytest.mark.parametrize(
    ("system", "turns", "wanted"),
    [
        ("", [], [("user", "now")]),
        (" be brief ", [], [("system", "be brief"), ("user", "now")]),
        ("", [("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "b"), ("user", "now")]),
        ("", [("user", "a"), ("assistant", "")], [("user", "a\n\nnow")]),
        ("", [("user", "a"), ("assistant", "<think>hm</think>b")],
         [("user", "a"), ("assistant", "b"), ("user", "now")]),
        ("", [("user", "a"), ("assistant", "<think>cut off")], [("user", "a\n\nnow")]),
        ("", [("user", "what is <think>?"), ("assistant", "b")],
         [("user", "what is <think>?"), ("assistant", "b"), ("user", "now")]),
    ],
)  # fmt: skip
def test_what_the_model_reads(system: str, turns: list[Any], wanted: list[Any]) -> None:
    found = conversation.messages(system, talk(*turns, ("user", "now")).path)
    assert [(turn["role"], turn["content"]) for turn in found] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("plain", [("plain", False, True)]),
        ("<think>a</think>b", [("a", True, True), ("b", False, True)]),
        ("<think>a", [("a", True, False)]),
        ("<think>\n</think>\n\nb", [("b", False, True)]),
        ("a</think>b", [("a", True, True), ("b", False, True)]),
        ("x<think>a</think>y<think>b</think>",
         [("x", False, True), ("a", True, True), ("y", False, True), ("b", True, True)]),
    ],
)  # fmt: skip
def test_reasoning_is_told_from_prose(text: str, wanted: list[Any]) -> None:
    assert [tuple(part) for part in conversation.parts(text)] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the sum $x + y$ here", r"the sum \(x + y\) here"),
        ("it costs $5 and $10", "it costs $5 and $10"),
        ("$ not $ math", "$ not $ math"),
        ("`$x$` and ```\n$y$\n```", "`$x$` and ```\n$y$\n```"),
        ("```\nopen $z$", "```\nopen $z$"),
        ("$$a$$ and $b$", r"$$a$$ and \(b\)"),
    ],
)
def test_single_dollars_mean_formulas_but_not_prices(text: str, wanted: str) -> None:
    assert conversation.with_formulas(text) == wanted


def test_what_the_window_shows() -> None:
    path = talk(("user", "  indented"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "")).path
    shown = conversation.shown(path)
    assert [entry["content"][0]["text"] for entry in shown] == ["  indented", "hm", "b", "c", ""]
    assert [(entry["metadata"] or {}).get("status") for entry in shown] == [None, "done", None, None, None]
    assert [found.number if (found := conversation.owner(path, place)) else None for place in range(-1, 6)] == [
        None, 1, 2, 2, 3, 4, None,
    ]  # fmt: skip
    growing = dataclasses.replace(path[1], text="<think>hm", reason="")
    assert conversation.shown([growing])[0]["metadata"] == {"title": "Reasoning", "status": "pending"}


def test_versions_branches_and_what_stands_under_messages() -> None:
    def message(number: int, parent: int | None, role: Any, reason: str = "stop", **figures: Any) -> Message:
        return Message(number, parent, role, f"text {number}", 1.0, reason, figures)

    messages = (
        message(1, None, "user"),
        message(2, 1, "assistant", tokens_per_s=12.34, ttft_s=0.256, new_tokens=40),
        message(3, 1, "assistant", "length"),
        message(4, 3, "user"),
        message(5, 4, "assistant", "error", error="no room"),
        message(6, 3, "user"),
    )
    whole = Conversation("id", "", 1.0, 1.0, 1, {}, 2, messages)
    assert [message.number for message in whole.path] == [1, 2]
    assert [whole.newest_leaf(number) for number in (1, 2, 3, 4)] == [6, 2, 6, 5]
    rows = conversation.rows(whole)
    assert [row["versions"] for row in rows] == [[1], [2, 3]]
    assert [row["continues"] for row in rows] == [False, True]
    assert rows[1]["note"] == "12.3 tokens/s · first token 0.26 s · 40 tokens"
    rows = conversation.rows(dataclasses.replace(whole, leaf=5))
    assert [row["note"] for row in rows] == ["", "longest answer reached", "", "no room"]
    assert [row["failed"] for row in rows] == [False, False, False, True]


# ---- files ----


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any tree of questions and answers."""
    messages: list[Message] = []
    for number in range(1, draw(st.integers(0, 8)) + 1):
        parent = draw(st.sampled_from([None, *range(1, number)]))
        role = "user" if parent is None or messages[parent - 1].role == "assistant" else "assistant"
        figures = draw(st.sampled_from([{}, {"tokens_per_s": 1.5}, {"error": "sentence"}]))
        reason = draw(st.sampled_from(sorted(conversation.REASONS)))
        messages.append(Message(number, parent, role, draw(TEXTS), 5.0, reason, figures))  # type: ignore[arg-type]
    leaf = draw(st.sampled_from([None, *range(1, len(messages) + 1)]))
    settings = draw(st.sampled_from([{}, {"system": "Be brief."}, {"temperature": 0.5, "checkpoint": "a/b"}]))
    title = conversation.title_of(draw(TEXTS)) or "Imported"
    return Conversation("", title, 1.0, 2.0, 0, settings, leaf, tuple(messages))


@settings(deadline=None, max_examples=60)
@given(st.lists(conversations(), max_size=3))
def test_json_brings_everything_back(found: list[Conversation]) -> None:
    assert transcripts.read(transcripts.to_json(found).encode(), "a.json") == found


LINES = st.sampled_from(
    ["## User", "## Assistant", "\\## User", "## System prompt ", "# title", "words", "", "  code", "`"]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(LINES, max_size=4), min_size=1, max_size=5))
def test_markdown_brings_the_open_branch_back(texts: list[list[str]]) -> None:
    roles = ("user", "assistant") * len(texts)
    whole = talk(*zip(roles, ["\n".join(lines) for lines in texts], strict=False))
    (back,) = transcripts.read(transcripts.to_markdown(whole).encode(), "a.md")
    assert back.title == "Title"
    assert [(each.role, each.text) for each in back.path] == [(each.role, each.text.strip()) for each in whole.path]


def test_markdown_is_made_for_people() -> None:
    whole = dataclasses.replace(talk(("user", "Why?"), ("assistant", "Because.")), settings={"system": "Be brief."})
    text = transcripts.to_markdown(whole)
    assert text == "# Title\n\n## System prompt\n\nBe brief.\n\n## User\n\nWhy?\n\n## Assistant\n\nBecause.\n"
    assert transcripts.read(text.encode(), "a.md")[0].settings == {"system": "Be brief."}


def test_a_plain_list_of_messages_is_read() -> None:
    entries = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    (found,) = transcripts.read(json.dumps(entries).encode(), "list.JSON")
    assert (found.title, found.settings) == ("Why?", {"system": "Be brief."})
    assert [message.text for message in found.path] == ["Why?", "Because."]


def damaged(**changes: Any) -> bytes:
    """An exported conversation of two messages; `changes` of it or, with a leading underscore, of its last message."""
    whole = json.loads(transcripts.to_json([talk(("user", "a"), ("assistant", "b"))]))
    entry = whole["conversations"][0]
    for name, value in changes.items():
        (entry["messages"][1] if name.startswith("_") else entry)[name.removeprefix("_")] = value
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"\xff\xfe", "a.json", "is not text in UTF-8"),
        (b"{", "a.json", "is not JSON"),
        (b"[" * 200_000, "a.json", "is not JSON"),
        (b"{}", "a.json", "holds no conversations"),
        (b'{"format": "moepic-conversations", "version": 2}', "a.json", "of version 2 and this program reads 1"),
        (b'{"format": "moepic-conversations", "version": 1, "conversations": 3}', "a.json", "no list of conversations"),
        (b'{"format": "moepic-conversations", "version": 1, "conversations": [3]}', "a.json", "it is 3"),
        (b"[]", "a.json", "holds no messages"),
        (b'[{"role": "tool", "content": "x"}]', "a.json", "message 1: role is 'tool', allowed is 'user', 'assistant'"),
        (b"just words", "a.md", "holds no messages"),
        (b"## User\na\n## User\nb", "a.md", "two messages of the user follow each other"),
        (damaged(title=7), "a.json", "conversation 1: title is 7, allowed is text"),
        (damaged(created="now"), "a.json", "created is 'now'"),
        (damaged(created=float("nan")), "a.json", "created is nan"),
        (damaged(updated=1e300), "a.json", "updated is 1e+300"),
        (damaged(updated=True), "a.json", "updated is True"),
        (damaged(leaf=3), "a.json", "leaf is 3"),
        (damaged(messages={}), "a.json", "messages is 'dict'"),
        (damaged(settings=[]), "a.json", "settings: it is []"),
        (damaged(settings={"temperature": "hot"}), "a.json", "settings: temperature is 'hot'"),
        (damaged(_number=1), "a.json", "message 2: number is 1, allowed is 2"),
        (damaged(_parent=2), "a.json", "parent is 2"),
        (damaged(_parent="1"), "a.json", "parent is '1'"),
        (damaged(_role="user"), "a.json", "role is 'user', allowed is the other one"),
        (damaged(_role=["user"]), "a.json", "role is ['user']"),
        (damaged(_text=None), "a.json", "text is None"),
        (damaged(_reason="bored"), "a.json", "reason is 'bored'"),
        (damaged(_figures={"ttft_s": -1}), "a.json", "figures: ttft_s is -1"),
        (b"x" * (transcripts.LIMIT_BYTES + 1), "a.md", "allowed are 16,000,000"),
    ],
)
def test_what_is_refused_and_in_which_words(data: bytes, name: str, words: str) -> None:
    with pytest.raises(BadTranscript) as refusal:
        transcripts.read(data, name)
    sentence = str(refusal.value)
    assert words in sentence
    assert sentence.startswith(name)
    assert "\n" not in sentence
    assert len(sentence) < 300


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_nothing_else_is_raised(data: bytes) -> None:
    for name in ("a.json", "a.md"):
        with contextlib.suppress(BadTranscript):
            transcripts.read(data, name)


def test_what_is_not_ours_is_left_out() -> None:
    (found,) = transcripts.read(damaged(settings={"evil": "x", "system": "s"}, more=1, _figures={"evil": 1}), "a.json")
    assert found.settings == {"system": "s"}
    assert found.messages[1].figures == {}


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Why so slow?", "Why-so-slow.md"),
        ("../../etc/passwd", "etc-passwd.md"),
        ("<b>ü</b>", "b-ü-b.md"),
        ("…", "conversation.md"),
    ],
)
def test_names_of_downloads(title: str, name: str) -> None:
    assert transcripts.file_name(dataclasses.replace(talk(), title=title), "md") == name
