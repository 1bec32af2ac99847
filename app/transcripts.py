"""Conversations as files: written for other programs as JSON and for people as Markdown, and read again. Pure.

The JSON holds every branch and setting; the Markdown holds the open branch. What is read was perhaps made by others:
every value is checked, nothing of it is run, and a file that does not fit raises BadTranscript with one sentence.
A plain JSON list of messages with `role` and `content`, as many programs write it, is read too.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterable
from typing import Any

from moepic_core.errors import MoepicError

from .conversation import REASONS, Conversation, Message, title_of

FORMAT = "moepic-conversations"
VERSION = 1
LIMIT_BYTES = 16_000_000
LIMIT_MESSAGES = 10_000
LATEST_S = 1e11  # of a date: the year 5138
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")
TEXTS = ("system", "checkpoint")
FIGURES = ("tokens_per_s", "ttft_s", "new_tokens", "prompt_tokens")
HEADINGS = {"## User": "user", "## Assistant": "assistant", "## System prompt": "system"}
# A line of a message that looks like one of ours gets a backslash in front, which Markdown does not show.
LOOKS_LIKE_OURS = re.compile(r"^(\\*)(?=## (?:User|Assistant|System prompt)\s*$)", re.MULTILINE)


class BadTranscript(MoepicError):
    """A file that should hold conversations does not."""


def to_json(conversations: Iterable[Conversation]) -> str:
    """Every branch of every conversation."""

    def entry(conversation: Conversation) -> dict[str, Any]:
        values = dataclasses.asdict(conversation)
        return {key: value for key, value in values.items() if key not in ("id", "changed")}

    whole = {"format": FORMAT, "version": VERSION, "conversations": [entry(each) for each in conversations]}
    return json.dumps(whole, indent=1, ensure_ascii=False)


def to_markdown(conversation: Conversation) -> str:
    """The open branch, to be read."""
    system = str(conversation.settings.get("system", "")).strip()
    turns = [("## System prompt", system)] if system else []
    turns += [("## User" if each.role == "user" else "## Assistant", each.text) for each in conversation.path]
    blocks = [f"{heading}\n\n{LOOKS_LIKE_OURS.sub(_escape, text.strip())}\n" for heading, text in turns]
    return "\n".join([f"# {title_of(conversation.title)}\n", *blocks])


def _escape(match: re.Match[str]) -> str:
    return match[1] + "\\"


def read(data: bytes, name: str) -> list[Conversation]:
    """The conversations in a file called `name`, without ids. Raises BadTranscript."""
    if len(data) > LIMIT_BYTES:
        raise BadTranscript(f"{name} has {len(data):,} bytes; allowed are {LIMIT_BYTES:,}, so import fewer at a time")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadTranscript(f"{name} is not text in UTF-8; export it again as JSON or Markdown") from error
    if not name.lower().endswith(".json"):
        return [_from_markdown(text, name)]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTranscript(f"{name} is not JSON; export it again") from error
    if isinstance(found, list):
        return [_from_plain_list(found, name)]
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadTranscript(f"{name} holds no conversations; wanted a file that was exported here")
    if found.get("version") != VERSION:
        raise BadTranscript(
            f"{name} is of version {found.get('version')!r} and this program reads {VERSION}; update MoEpic"
        )
    entries = found.get("conversations")
    if not isinstance(entries, list):
        raise BadTranscript(f"{name} holds no list of conversations; export it again")
    return [_Checked(f"{name}, conversation {place}", entry).conversation() for place, entry in enumerate(entries, 1)]


class _Checked:
    """One dictionary of a file, and where it stands. Each getter raises BadTranscript for what does not fit."""

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise self.wrong("it", values, "an object")
        self.values: dict[str, Any] = values

    def wrong(self, key: str, found: Any, allowed: str) -> BadTranscript:
        return BadTranscript(f"{self.where}: {key} is {title_of(repr(found))}, allowed is {allowed}; export it again")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, value, "text")
        return value

    def number(self, key: str, highest: float) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            raise self.wrong(key, value, f"a number from 0 to {highest:g}")
        return value

    def one_of(self, key: str, allowed: Iterable[str]) -> Any:
        value = self.values.get(key)
        if value not in list(allowed):
            raise self.wrong(key, value, ", ".join(map(repr, allowed)))
        return value

    def part(self, key: str, numbers: Iterable[str], texts: Iterable[str]) -> dict[str, Any]:
        """The dictionary under `key`, of which only what we know is kept."""
        part = _Checked(f"{self.where}, {key}", self.values.get(key, {}))
        values = {name: part.text(name) for name in texts if part.values.get(name) is not None}
        return values | {name: part.number(name, 1e12) for name in numbers if part.values.get(name) is not None}

    def conversation(self) -> Conversation:
        entries = self.values.get("messages")
        if not isinstance(entries, list) or len(entries) > LIMIT_MESSAGES:
            raise self.wrong("messages", type(entries).__name__, f"a list of at most {LIMIT_MESSAGES:,}")
        messages: list[Message] = []
        for place, entry in enumerate(entries, 1):
            messages.append(_Checked(f"{self.where}, message {place}", entry).message(place, messages))
        leaf = self.values.get("leaf")
        if leaf is not None and leaf not in [message.number for message in messages]:
            raise self.wrong("leaf", leaf, "the number of one of its messages")
        return Conversation(
            "",
            title_of(self.text("title")) or "Imported",
            self.number("created", LATEST_S),
            self.number("updated", LATEST_S),
            0,
            self.part("settings", NUMBERS, TEXTS),
            leaf,
            tuple(messages),
        )

    def message(self, place: int, before: list[Message]) -> Message:
        """Message `place`; numbers count from 1, so a parent stands before its children and there is no circle."""
        if self.values.get("number") != place:
            raise self.wrong("number", self.values.get("number"), str(place))
        parent, role = self.values.get("parent"), self.one_of("role", ("user", "assistant"))
        if parent is not None and (not isinstance(parent, int) or not 1 <= parent < place):
            raise self.wrong("parent", parent, f"none or a number below {place}")
        if parent is not None and before[parent - 1].role == role:
            raise self.wrong("role", role, "the other one than that of the message before it")
        created, reason = self.number("created", LATEST_S), self.one_of("reason", REASONS)
        figures = self.part("figures", FIGURES, ("error",))
        return Message(place, parent, role, self.text("text"), created, reason, figures)


def _from_plain_list(entries: list[Any], name: str) -> Conversation:
    turns: list[tuple[str, str]] = []
    for place, entry in enumerate(entries, 1):
        checked = _Checked(f"{name}, message {place}", entry)
        turns.append((checked.one_of("role", ("user", "assistant", "system")), checked.text("content")))
    return _from_turns("", turns, name)


def _from_markdown(text: str, name: str) -> Conversation:
    """Headings of ours begin messages; what stands before the first one is the title."""
    title, turns = "", list[tuple[str, list[str]]]()
    for line in text.replace("\r\n", "\n").split("\n"):
        role = HEADINGS.get(line.rstrip())
        if role is not None:
            turns.append((role, []))
        elif turns:
            turns[-1][1].append(line[1:] if line.startswith("\\") and LOOKS_LIKE_OURS.match(line) else line)
        elif line.startswith("# ") and not title:
            title = line[2:]
    return _from_turns(title, [(role, "\n".join(lines).strip()) for role, lines in turns], name)


def _from_turns(title: str, turns: list[tuple[str, str]], name: str) -> Conversation:
    system = "\n\n".join(text for role, text in turns if role == "system")
    spoken = [(role, text) for role, text in turns if role != "system"]
    if not spoken:
        raise BadTranscript(
            f"{name} holds no messages; wanted headings '## User' and '## Assistant', or a list of them"
        )
    if len(spoken) > LIMIT_MESSAGES:
        raise BadTranscript(f"{name} holds {len(spoken):,} messages; allowed are {LIMIT_MESSAGES:,}")
    now, messages = time.time(), list[Message]()
    for place, (role, text) in enumerate(spoken, 1):
        if role not in ("user", "assistant") or (messages and messages[-1].role == role):
            raise BadTranscript(f"{name}, message {place}: two messages of the {role} follow each other; join them")
        messages.append(Message(place, place - 1 or None, "user" if role == "user" else "assistant", text, now))
    return Conversation(
        "", title_of(title or spoken[0][1]) or "Imported", now, now, 0, {"system": system} if system else {},
        len(messages), tuple(messages),
    )  # fmt: skip


def file_name(conversation: Conversation, ending: str) -> str:
    """A name for a download that every file system takes."""
    words = re.sub(r"[^\w\- ]+", " ", conversation.title).split()
    return f"{'-'.join(words)[:60] or 'conversation'}.{ending}"
