"""Conversations on disk, in one SQLite file that many tabs and many processes may share.

The chat writes down what is asked and answered, the list beside it reads titles; nobody else knows SQLite. Every call
is one transaction: a message that was saved survives the end of the process in any way. Trouble with the file never
reaches the chat, see `database`. Deleted conversations can be restored for a while and are then overwritten.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moepic_core.errors import BadSettings

from .conversation import REASONS, Conversation, Message, Role, title_of
from .database import BUSY_S, LAST_CHANGE, Database

RESTORABLE_S = 60.0
EXCERPT_CHARS = 70
LIMIT = 500  # conversations in one list


class Entry(NamedTuple):
    """One line of the list."""

    id: str
    title: str
    updated: float
    changed: int
    excerpt: str  # where the search found something; empty when it was in the title


def default_path() -> Path:
    """In MOEPIC_HOME beside the packed files; without it where data lives, because caches are cleaned."""
    home = os.environ.get("MOEPIC_HOME")
    data = Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")) / "moepic"
    return Path(home or data).expanduser() / "conversations.sqlite3"


class Store:
    """See the module. `path` None keeps everything in memory, for as long as the process lives."""

    def __init__(self, path: Path | None = None, busy_s: float = BUSY_S) -> None:
        self._db = Database(path, busy_s)
        self._db.write(lambda db: db.execute("DELETE FROM conversations WHERE deleted IS NOT NULL"))

    @property
    def problem(self) -> str | None:
        """A sentence while conversations are not being saved."""
        return self._db.problem

    def close(self) -> None:
        self._db.close()

    def version(self) -> int:
        """Another number after every change."""
        return int(self._db.read(lambda db: db.execute(LAST_CHANGE).fetchone())[0])

    def entries(self, search: str = "") -> list[Entry]:
        """The newest first; with `search`, those that have these letters in title or text."""
        needle = search.strip().casefold()
        found = "AND (contains(title, ?) OR id IN (SELECT conversation FROM messages WHERE contains(text, ?)))"
        query = (
            "SELECT id, title, updated, changed FROM conversations"
            f" WHERE deleted IS NULL {found if needle else ''} ORDER BY updated DESC LIMIT {LIMIT}"
        )
        text = "SELECT text FROM messages WHERE conversation = ? AND contains(text, ?) LIMIT 1"

        def read(db: sqlite3.Connection) -> list[Entry]:
            entries = []
            for id, title, updated, changed in db.execute(query, (needle, needle) if needle else ()).fetchall():
                hit = None if needle in title.casefold() else db.execute(text, (id, needle)).fetchone()
                entries.append(Entry(id, title, updated, changed, _excerpt(hit[0], needle) if hit else ""))
            return entries

        return self._db.read(read)

    def get(self, id: str | None) -> Conversation | None:
        """The conversation, or None when there is none (any more)."""

        def read(db: sqlite3.Connection) -> Conversation | None:
            row = db.execute(
                "SELECT title, created, updated, changed, settings, leaf FROM conversations"
                " WHERE id = ? AND deleted IS NULL", (id,)
            ).fetchone()  # fmt: skip
            if row is None:
                return None
            title, began, updated, changed, settings, leaf = row
            found = db.execute(
                "SELECT number, parent, role, text, created, reason, figures FROM messages"
                " WHERE conversation = ? ORDER BY number", (id,)
            ).fetchall()  # fmt: skip
            messages = tuple(
                Message(number, parent, role, text, created, reason, json.loads(figures))
                for number, parent, role, text, created, reason, figures in found
            )
            return Conversation(str(id), title, began, updated, changed, json.loads(settings), leaf, messages)

        return self._db.read(read)

    def create(self, settings: Mapping[str, Any], title: str = "") -> str:
        """A new, empty conversation; its first question names it unless `title` does."""
        now = time.time()
        return self.insert(Conversation("", title, now, now, 0, settings, None, ()))

    def insert(self, conversation: Conversation) -> str:
        """Writes `conversation` down as a new one, whatever its id, and returns the new id."""
        id = secrets.token_hex(8)

        def write(db: sqlite3.Connection) -> None:
            values = (id, clean(conversation.title), conversation.created, conversation.updated, _next_change(db),
                      json.dumps(dict(conversation.settings)), conversation.leaf, None)  # fmt: skip
            db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            _insert(db, id, conversation.messages)

        self._db.write(write)
        return id

    def add(self, id: str, role: Role, text: str, parent: int | None, reason: str = "stop") -> int:
        """Appends a message behind `parent`, opens its branch and returns its number."""

        def write(db: sqlite3.Connection) -> int:
            last = db.execute("SELECT coalesce(max(number), 0) FROM messages WHERE conversation = ?", (id,)).fetchone()[
                0
            ]
            _insert(db, id, [Message(last + 1, parent, role, text, time.time(), reason)])
            db.execute(
                "UPDATE conversations SET leaf = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?",
                (last + 1, title_of(clean(text)), id),
            )
            _touch(db, id)
            return int(last) + 1

        return self._db.write(write)

    def save(self, id: str, number: int, text: str, reason: str, figures: Mapping[str, Any] | None = None) -> None:
        """Replaces what message `number` says. `reason` stays empty while it is being written."""
        assert reason in REASONS, reason

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE messages SET text = ?, reason = ?, figures = ? WHERE conversation = ? AND number = ?",
                (clean(text), reason, json.dumps(dict(figures or {})), id, number),
            )
            _touch(db, id)

        self._db.write(write)

    def open_branch(self, id: str, leaf: int | None) -> None:
        """Makes the branch that ends with message `leaf` the open one; None is the place before the first message."""
        self._update(id, "leaf", leaf)

    def configure(self, id: str, settings: Mapping[str, Any]) -> None:
        self._update(id, "settings", json.dumps(dict(settings)))

    def rename(self, id: str, title: str) -> None:
        """Raises BadSettings for a title without letters."""
        if not title.strip():
            raise BadSettings("a conversation needs a title; give at least one letter")
        self._update(id, "title", title_of(clean(title)))

    def delete(self, id: str) -> None:
        """Takes the conversation from the list; `restore` brings it back for a minute."""
        self._update(id, "deleted", time.time())

    def restore(self, id: str) -> None:
        self._update(id, "deleted", None)

    def branch(self, id: str, number: int) -> str | None:
        """A new conversation that goes on after message `number`; None when there is no such message."""
        source = self.get(id)
        if source is None or number not in [message.number for message in source.messages]:
            return None
        path = source.path_to(number)
        copies = tuple(
            Message(place, place - 1 or None, old.role, old.text, old.created, old.reason, old.figures)
            for place, old in enumerate(path, 1)
        )
        now, title = time.time(), title_of(f"{source.title} (branch)")
        return self.insert(Conversation("", title, now, now, 0, source.settings, len(copies), copies))

    def _update(self, id: str, column: str, value: Any) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute(f"UPDATE conversations SET {column} = ? WHERE id = ?", (value, id))
            _touch(db, id)

        self._db.write(write)


def clean(text: str) -> str:
    """`text` as UTF-8 can hold it: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _next_change(db: sqlite3.Connection) -> int:
    """Microseconds since 1970, and more than that where two changes come at once."""
    last = db.execute(LAST_CHANGE).fetchone()[0]
    return max(int(last) + 1, time.time_ns() // 1000)


def _touch(db: sqlite3.Connection, id: str) -> None:
    now = time.time()
    db.execute("UPDATE conversations SET changed = ?, updated = ? WHERE id = ?", (_next_change(db), now, id))
    db.execute("DELETE FROM conversations WHERE deleted < ?", (now - RESTORABLE_S,))


def _insert(db: sqlite3.Connection, id: str, messages: Iterable[Message]) -> None:
    db.executemany(
        "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                id,
                new.number,
                new.parent,
                new.role,
                clean(new.text),
                new.created,
                new.reason,
                json.dumps(dict(new.figures)),
            )
            for new in messages
        ],
    )


def _excerpt(text: str, needle: str) -> str:
    """The words around the first `needle`."""
    flat = " ".join(text.split())
    start = max(0, flat.casefold().find(" ".join(needle.split())) - EXCERPT_CHARS // 3)
    return ("…" if start else "") + flat[start : start + EXCERPT_CHARS]
