"""Conversations on disk: what was saved stays, whatever happens to the process, the file and the disk."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from app import database, store
from app.conversation import Conversation
from app.store import Store
from moepic_core.errors import BadSettings

ROOT = Path(__file__).parents[1]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "conversations.sqlite3"


def talk(store: Store, *texts: str) -> str:
    """A conversation of these texts, in turn of user and assistant."""
    id, parent = store.create({}), None
    for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False):
        parent = store.add(id, role, text, parent)  # type: ignore[arg-type]
    return id


def texts(store: Store, id: str) -> list[str]:
    conversation = store.get(id)
    assert conversation is not None
    return [message.text for message in conversation.path]


class Model(RuleBasedStateMachine):
    """The store beside a dictionary. Reopening at any moment changes nothing but what can still be restored."""

    conversations, messages = Bundle("conversations"), Bundle("messages")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.store = Store(Path(self.folder) / "store")
        self.model: dict[str, dict[int, tuple[int | None, str]]] = {}
        self.titles: dict[str, str] = {}
        self.leaves: dict[str, int | None] = {}
        self.deleted: set[str] = set()
        self.version = self.store.version()

    @rule(target=conversations, title=TEXTS)
    def create(self, title: str) -> str:
        id = self.store.create({"system": title}, title)
        self.model[id], self.titles[id], self.leaves[id] = {}, title, None
        return id

    @rule(target=messages, id=conversations, text=TEXTS, at_start=st.booleans())
    def add(self, id: str, text: str, at_start: bool) -> tuple[str, int]:
        if id not in self.model or id in self.deleted:
            return (id, 0)
        parent = None if at_start else self.leaves[id]
        number = self.store.add(id, "user", text, parent)
        assert number == len(self.model[id]) + 1
        self.model[id][number] = (parent, text)
        self.leaves[id] = number
        self.titles[id] = self.titles[id] or database_title(text)
        return (id, number)

    @rule(message=messages, text=TEXTS)
    def save(self, message: tuple[str, int], text: str) -> None:
        id, number = message
        if number and id in self.model:
            self.store.save(id, number, text, "stop", {"new_tokens": 3})
            self.model[id][number] = (self.model[id][number][0], text)

    @rule(message=messages)
    def choose(self, message: tuple[str, int]) -> None:
        id, number = message
        if number and id in self.model:
            self.store.open_branch(id, number)
            self.leaves[id] = number

    @rule(target=conversations, message=messages)
    def branch(self, message: tuple[str, int]) -> str:
        id, number = message
        if not number or id not in self.model or id in self.deleted:
            assert self.store.branch(id, number) is None
            return id
        path = self.path(id, number)
        new = self.store.branch(id, number)
        assert new is not None
        self.model[new] = {place: (place - 1 or None, text) for place, text in enumerate(path, 1)}
        self.titles[new] = database_title(f"{self.titles[id]} (branch)")
        self.leaves[new] = len(path)
        return new

    @rule(id=conversations, title=TEXTS)
    def rename(self, id: str, title: str) -> None:
        if id in self.model and title.strip():
            self.store.rename(id, title)
            self.titles[id] = database_title(title)

    @rule(id=consumes(conversations), back=st.booleans())
    def delete(self, id: str, back: bool) -> None:
        self.store.delete(id)
        self.deleted.add(id)
        if back:
            self.store.restore(id)
            self.deleted.discard(id)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(Path(self.folder) / "store")
        for id in self.deleted:
            self.model.pop(id, None)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.problem is None
        listed = {entry.id: entry.title for entry in self.store.entries()}
        assert listed == {id: self.titles[id] for id in self.model if id not in self.deleted}
        for id in listed:
            found = self.store.get(id)
            assert found is not None
            assert {each.number: (each.parent, each.text) for each in found.messages} == self.model[id]
            assert [each.text for each in found.path] == self.path(id, self.leaves[id])

    def path(self, id: str, number: int | None) -> list[str]:
        texts = []
        while number is not None:
            number, text = self.model[id][number]
            texts.append(text)
        return texts[::-1]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


def database_title(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else words[:59].rstrip() + "…"


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestModel = Model.TestCase


def test_every_change_has_a_version_of_its_own(path: Path) -> None:
    one, other = Store(path), Store(path)
    seen = {one.version()}
    for _ in range(20):
        id = talk(one, "a", "b")
        assert one.version() == other.version() not in seen
        seen.add(one.version())
        other.save(id, 2, "c", "stop")
        assert one.version() == other.version() not in seen
        seen.add(one.version())
    one.close()
    other.close()


def test_a_new_file_is_for_its_owner_alone(path: Path) -> None:
    Store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_message_keeps(path: Path) -> None:
    store = Store(path)
    id = talk(store, "Why?\nAnd how?", "")
    store.configure(id, {"system": "Be brief.", "temperature": 0.2})
    store.save(id, 2, "half a surrogate \ud800", "")
    unfinished = store.get(id)
    assert unfinished is not None
    assert (unfinished.title, unfinished.settings["system"]) == ("Why? And how?", "Be brief.")
    assert (unfinished.messages[1].text, unfinished.messages[1].reason) == ("half a surrogate ?", "")
    store.save(id, 2, "whole", "length", {"tokens_per_s": 12.5})
    found = store.get(id)
    assert found is not None
    assert (found.messages[1].reason, found.messages[1].figures) == ("length", {"tokens_per_s": 12.5})
    with pytest.raises(BadSettings, match="needs a title"):
        store.rename(id, " \n")
    store.close()


def test_search_finds_titles_and_texts_in_any_case() -> None:
    store = Store()
    first = talk(store, "Über die Brücke", "So it goes: " + "word " * 40 + "needle " + "word " * 40)
    second = talk(store, "100% _literal_", "x")
    assert [entry.id for entry in store.entries()] == [second, first]
    assert [entry.id for entry in store.entries("ÜBER")] == [first]
    assert [entry.id for entry in store.entries("%")] == [second]
    assert store.entries("needless") == []
    (hit,) = store.entries("NEEDLE")
    assert "needle" in hit.excerpt
    assert hit.excerpt.startswith("…")
    assert len(hit.excerpt) <= longest_excerpt()
    store.delete(first)
    assert store.entries("needle") == []
    assert store.get(first) is None
    store.restore(first)
    assert texts(store, first)[0] == "Über die Brücke"


def longest_excerpt() -> int:
    return store.EXCERPT_CHARS + 1


def test_deleted_text_is_gone_from_the_file_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store(path)
    secret = talk(kept, "the password is swordfish")
    kept.delete(secret)
    monkeypatch.setattr(store, "RESTORABLE_S", -1)
    talk(kept, "something else")
    kept.restore(secret)
    assert kept.get(secret) is None
    kept.close()
    assert all(b"swordfish" not in file.read_bytes() for file in path.parent.iterdir())


WRITER = """
import sys
from pathlib import Path
from app.store import Store
store = Store(Path(sys.argv[1]))
id = store.create({})
parent = None
for count in range(10**6):
    parent = store.add(id, "user", f"question {count}", parent)
    parent = store.add(id, "assistant", "", parent, "")
    for words in range(5):
        store.save(id, parent, f"answer {count} " + "word " * words, "")
    print("running", count, flush=True)
    store.save(id, parent, f"answer {count} whole", "stop")
    print("finished", count, flush=True)
"""


def test_no_finished_message_is_lost_by_kill_9(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    for num_lines in (1, 20, 41):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = list(itertools.islice(process.stdout, num_lines))
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        # The kill may fall inside a line: where Python runs unbuffered, print writes every word by itself.
        state, count = [line for line in lines if line.endswith("\n")][-1].split()
        store = Store(path)
        assert store.problem is None
        conversation = store.get(store.entries()[0].id)
        assert conversation is not None
        answers = [message for message in conversation.path if message.role == "assistant"]
        finished = int(count) + (state == "finished")
        assert [message.text for message in answers[:finished]] == [f"answer {i} whole" for i in range(finished)]
        if state == "running":  # at least what had been saved by then
            assert answers[finished].text.startswith(f"answer {count} w")
        store.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_file_costs_one_sentence(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    store = Store(path)
    id = talk(store, "still", "here")
    assert texts(store, id) == ["still", "here"]
    assert store.problem is not None
    assert store.problem.startswith("conversations are not being saved: the file is damaged")
    assert str(path) in store.problem
    store.close()
    assert path.read_bytes() == content


def test_damage_that_shows_later(path: Path) -> None:
    whole = Store(path)
    ids = [talk(whole, f"question {i}", "text " * 2000) for i in range(20)]
    whole.close()
    data = bytearray(path.read_bytes())
    for page in range(5 * 4096, len(data), 4096):
        data[page : page + 64] = b"\xff" * 64
    path.write_bytes(data)
    store = Store(path)
    for id in ids:
        store.get(id)
    store.entries("text")
    assert "the file is damaged" in (store.problem or "")
    assert texts(store, talk(store, "still", "here")) == ["still", "here"]
    store.close()


def test_a_newer_file_is_left_alone(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    store = Store(path)
    assert store.problem is not None
    assert "the file is of version 7 and this program knows 1" in store.problem
    assert "update MoEpic" in store.problem
    talk(store, "a", "b")
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM conversations").fetchone() == (0,)
    db.close()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "folder" / "conversations")
    assert "the file cannot be written, Not a directory" in (store.problem or "")
    assert texts(store, talk(store, "still", "here")) == ["still", "here"]
    store.close()


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_a_locked_file_and_a_full_disk_are_overcome(path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RETRY_S", 0.0)
    kept = Store(path, busy_s=0.01)
    before = talk(kept, "before", "it")
    other = sqlite3.connect(path, isolation_level=None)
    if trouble == "locked":
        other.execute("BEGIN IMMEDIATE")
    else:
        limit_pages(kept)
        monkeypatch.setattr(database.Database, "_open", no_room)
    during = talk(kept, "during", "it " * 4000)
    kept.rename(before, "renamed")
    words = {"locked": "another program keeps the file locked", "full": "the disk is full"}
    assert words[trouble] in (kept.problem or "")
    assert {entry.title for entry in kept.entries()} == {"renamed", "during"}
    if trouble == "locked":
        other.execute("ROLLBACK")
    else:
        monkeypatch.undo()
        monkeypatch.setattr(database, "RETRY_S", 0.0)
    other.close()
    kept.add(during, "user", "after", 2)
    assert kept.problem is None
    kept.close()
    again = Store(path)
    assert texts(again, during) == ["during", "it " * 4000, "after"]
    assert {entry.title for entry in again.entries()} == {"renamed", "during"}
    again.close()


def limit_pages(store: Store) -> None:
    db = store._db._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")


def no_room(*_: object) -> sqlite3.Connection:
    raise sqlite3.OperationalError("database or disk is full")


def test_our_own_mistakes_are_raised(path: Path) -> None:
    store = Store(path)
    with pytest.raises(sqlite3.IntegrityError):
        store.add("nobody", "user", "text", None)
    with pytest.raises(AssertionError, match="boredom"):
        store.save(talk(store, "a"), 1, "text", "boredom")
    assert store.problem is None
    store.close()


def test_the_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path))
    assert store.default_path() == tmp_path / "conversations.sqlite3"
    monkeypatch.delenv("MOEPIC_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert store.default_path() == tmp_path / "data" / "moepic" / "conversations.sqlite3"


def test_insert_gives_a_new_id() -> None:
    store = Store()
    source = store.get(talk(store, "a", "b"))
    assert isinstance(source, Conversation)
    copy = store.get(store.insert(source))
    assert copy is not None
    assert copy.id != source.id
    assert (copy.title, copy.messages) == (source.title, source.messages)
