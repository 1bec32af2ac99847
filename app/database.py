"""One SQLite file, and memory in its place when the file makes trouble.

The store calls `read` and `write` with functions that work on a connection; each write is one transaction. A file that
is damaged, locked, newer than this program or without room raises nothing: what can be read of it is copied to memory,
`problem` says in a sentence what happened, and work goes on there. When the file can be written again, what has
changed since is written to it. Mistakes of our own are raised.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
SCHEMA_VERSION = 1  # a change of SCHEMA raises it and says how older files are brought up to it
SCHEMA = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, changed INTEGER NOT NULL,
    settings TEXT NOT NULL, leaf INTEGER, deleted REAL
);
CREATE INDEX by_change ON conversations (changed);
CREATE TABLE messages (
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE, number INTEGER NOT NULL, parent INTEGER,
    role TEXT NOT NULL, text TEXT NOT NULL, created REAL NOT NULL, reason TEXT NOT NULL, figures TEXT NOT NULL,
    PRIMARY KEY (conversation, number)
) WITHOUT ROWID;
"""
BUSY_S = 2.0  # how long another process may hold the file before we go on without it
RETRY_S = 10.0  # between two attempts to go back to the file
LAST_CHANGE = "SELECT coalesce(max(changed), 0) FROM conversations"


class Database:
    """See the module. `path` None keeps everything in memory."""

    def __init__(self, path: Path | None, busy_s: float = BUSY_S) -> None:
        self.problem: str | None = None  # a sentence while nothing is written to the file
        self._path = path
        self._busy_s = busy_s
        self._lock = threading.RLock()
        self._left_at = 0  # the last change that the file has, while there is a problem
        self._tried_s = 0.0
        self._db = _in_memory()
        if path is not None:
            try:
                self._db = self._open(path)
            except (OSError, sqlite3.Error) as error:
                self._leave(error)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                return work(self._db)
            except sqlite3.DatabaseError as error:
                self._leave(error)
                return work(self._db)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            if self.problem is not None:
                self._try_to_return()
            try:
                return _in_transaction(self._db, work)
            except sqlite3.DatabaseError as error:
                self._leave(error)
                return _in_transaction(self._db, work)

    def _open(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what people write is for their eyes alone
        db = _connect(str(path), self._busy_s)
        try:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA_VERSION:
                raise NewerFile(version)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # survives the end of the process; only a power cut costs seconds
            if version == 0:
                _in_transaction(db, _create)
        except BaseException:
            db.close()
            raise
        return db

    def _leave(self, error: OSError | sqlite3.Error) -> None:
        """Goes on in memory, with all that can still be read from the file. Raises what is our own mistake."""
        if self._path is None or self.problem is not None or not _is_about_the_file(error):
            raise error
        left, self._db = self._db, _in_memory()
        _copy(left, self._db, 0)
        left.close()
        self._left_at = int(self._db.execute(LAST_CHANGE).fetchone()[0])
        self._tried_s = time.monotonic()
        why, remedy = _explain(error)
        self.problem = f"conversations are not being saved: {why} ({self._path}); {remedy}"
        if isinstance(error, NewerFile) or _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._tried_s = float("inf")  # writing would only do more damage

    def _try_to_return(self) -> None:
        assert self._path is not None
        if time.monotonic() - self._tried_s < RETRY_S:
            return
        self._tried_s = time.monotonic()
        try:
            db = self._open(self._path)
            try:
                _copy(self._db, db, self._left_at, strict=True)
            except BaseException:
                db.close()
                raise
        except (OSError, sqlite3.Error):
            return  # `problem` still says why
        self._db.close()
        self._db, self.problem = db, None


class NewerFile(sqlite3.DatabaseError):
    """The file was written by a later version of this application."""


def _connect(name: str, busy_s: float = 0.0) -> sqlite3.Connection:
    db = sqlite3.connect(name, timeout=busy_s, isolation_level=None, check_same_thread=False)
    db.create_function("contains", 2, lambda text, needle: needle in text.casefold(), deterministic=True)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA secure_delete = ON")
    return db


def _in_memory() -> sqlite3.Connection:
    db = _connect(":memory:")
    _create(db)
    return db


def _create(db: sqlite3.Connection) -> None:
    for statement in SCHEMA.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, since: int, strict: bool = False) -> None:
    """Copies every conversation that changed after `since`; unless `strict`, as far as the source can be read."""

    def copy(id: str) -> None:
        rows = source.execute("SELECT * FROM conversations WHERE id = ?", (id,)).fetchall()
        messages = source.execute("SELECT * FROM messages WHERE conversation = ?", (id,)).fetchall()

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM conversations WHERE id = ?", (id,))
            db.executemany("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            db.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", messages)

        _in_transaction(target, write)

    try:
        for (id,) in source.execute("SELECT id FROM conversations WHERE changed > ?", (since,)).fetchall():
            copy(id)
    except sqlite3.DatabaseError:
        if strict:
            raise


def _code(error: OSError | sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for other errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_about_the_file(error: OSError | sqlite3.Error) -> bool:
    return isinstance(error, OSError) or type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError, NewerFile)


def _explain(error: OSError | sqlite3.Error) -> tuple[str, str]:
    """(what is wrong, what to do) in words."""
    if isinstance(error, NewerFile):
        return (
            f"the file is of version {error} and this program knows {SCHEMA_VERSION}",
            "update MoEpic, or set MOEPIC_HOME to another folder",
        )
    known = {
        sqlite3.SQLITE_FULL: ("the disk is full", "free some room and they will be"),
        sqlite3.SQLITE_BUSY: ("another program keeps the file locked", "close it and they will be"),
        sqlite3.SQLITE_LOCKED: ("another program keeps the file locked", "close it and they will be"),
        sqlite3.SQLITE_CORRUPT: ("the file is damaged", "move it away and start again; export what you need first"),
        sqlite3.SQLITE_NOTADB: ("the file is damaged", "move it away and start again; export what you need first"),
    }
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return known.get(_code(error), (f"the file cannot be written, {reason}", "make it writable or set MOEPIC_HOME"))
