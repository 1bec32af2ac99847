"""When things go wrong under a conversation: one sentence says what happened, words and settings stay, work goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.faults import explained
from app.state import State
from app.store import Store
from app.talk import Talk
from moepic_core.engine import Engine
from moepic_core.errors import MoepicError, OutOfRoom, TransferFailed
from moepic_core.spec import Settings

SAMPLING = {"system": "", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24}
LOST = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfRoom("no room"), "no room"),
        (
            torch.AcceleratorError(LOST),
            "the GPU stopped working (CUDA error: unspecified launch failure); start MoEpic",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "the GPU stopped working"),
        (TransferFailed(f"cannot copy 7 bytes to the device, tried twice: {LOST}"), "the GPU stopped working (cannot"),
        (torch.OutOfMemoryError(NO_MEMORY), "memory ran out (CUDA out of memory"),
        (MemoryError(), "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some room"),
        (OSError(errno.EIO, "Input/output error"), "the engine failed by a mistake of ours (OSError: [Errno 5]"),
        (
            AssertionError(),
            "the engine failed by a mistake of ours (AssertionError), the console shows it; press Reload",
        ),
    ],
)
def test_every_failure_is_one_sentence(error: Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    found = explained(error)
    assert str(found).startswith(words)
    assert "\n" not in str(found)
    is_new = not isinstance(error, MoepicError)
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [error] * is_new


class Chat:
    """A conversation with a real, tiny model."""

    def __init__(self, folder: Path, packed: Path, **settings: Any) -> None:
        values = {"checkpoint": str(folder), "device": "cpu", "link": "emulated:50MB/s", "context_length": 256}
        self.settings = Settings.create(**{**values, "packed_dir": str(packed), **settings})
        self.state = State(self.settings)
        self.talk = Talk(Store(), self.state)
        self.beside = "{}"
        self.load(self.settings)
        assert self.notice == ""

    def load(self, settings: Settings) -> None:
        self.state.load(settings)
        self.state.wait()

    @property
    def engine(self) -> Engine:
        assert self.state._engine is not None
        return self.state._engine

    @property
    def notice(self) -> str:
        notice = self.state.look().notice
        return notice.text if notice else ""

    def ask(self, text: str = "what?") -> tuple[str, str]:
        """(answer, what stands under it)."""
        self.beside = self.talk.send(text, self.beside, SAMPLING)[2]
        *_, (_, beside) = self.talk.answer(self.beside, SAMPLING, threading.Event())
        assert beside is not None
        self.beside = beside
        found = self.talk.store.get(json.loads(beside)["id"])
        assert found is not None
        return found.path[-1].text, json.loads(beside)["rows"][-1]["note"]

    def texts(self) -> list[str]:
        found = self.talk.store.get(json.loads(self.beside)["id"])
        assert found is not None
        return [message.text for message in found.path]


@pytest.fixture
def chat(checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setattr("app.state.UPDATE_S", 0.001)
    chat = Chat(checkpoints("qwen3_moe"), tmp_path)
    yield chat
    chat.state.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("moepic", "reply", "load"))]


def fail(patch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, after: int, times: int = 10**9) -> None:
    """Lets `owner.name` raise `error` from call number `after` on, so many times."""
    work, calls = getattr(owner, name), 0

    def failing(*values: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if after < calls <= after + times:
            raise error
        return work(*values, **more)

    patch.setattr(owner, name, failing)


def test_memory_that_runs_out_once_costs_a_notice(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = chat.ask()
    fail(monkeypatch, chat.engine.hf, "forward", torch.OutOfMemoryError(NO_MEMORY), after=4, times=1)
    answer, note = chat.ask("and again?")
    assert answer
    assert "tokens/s" in note
    assert "memory ran out, so the budget went from" in chat.notice
    assert "set vram to" in chat.notice
    assert chat.texts() == ["what?", expected, "and again?", answer]


FAULTS = {
    "memory": ("pass", torch.OutOfMemoryError(NO_MEMORY), "memory ran out twice", "lower vram"),
    "a lost GPU": ("pass", torch.AcceleratorError(LOST), "the GPU stopped working", "start MoEpic again"),
    "a lost link": ("router", TransferFailed(f"no copy: {LOST}"), "the GPU stopped working", "cpu"),
    "our mistake": ("router", AssertionError("1 != 2"), "mistake of ours (AssertionError: 1 != 2)",
                    "press Reload"),
    "a file": ("router", TransferFailed("cannot read 7 bytes"), "cannot read 7 bytes", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after", [0, 7])
def test_an_engine_that_fails_in_the_middle_of_a_reply(
    chat: Chat, fault: str, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "moepic")
    whole, _ = chat.ask()
    place, error, happened, remedy = FAULTS[fault]
    routers = [layer.mlp.gate for layer in chat.engine.hf.model.model.layers if hasattr(layer.mlp, "gate")]
    owner = chat.engine.hf if place == "pass" else routers[1]
    settings = chat.state.look().loaded
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, owner, "forward", error, after)
        answer, note = chat.ask("what next?")
        for sentence in (note, chat.notice):
            assert happened in sentence
            assert remedy in sentence
            assert "\n" not in sentence
        assert bool(answer) is bool(after)
        assert chat.state.look().snapshot.phase == "idle"  # type: ignore[union-attr]
        assert happened in chat.ask("still there?")[1]  # the fault goes on, and so does the page
    assert chat.state.look().loaded == settings
    assert chat.texts()[:4] == ["what?", whole, "what next?", answer]
    chat.beside = "{}"
    assert chat.ask()[0] == whole  # as if nothing had happened
    chat.engine.check()
    assert chat.notice == ""


def test_a_device_that_is_gone_can_be_loaded_again_when_it_is_back(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "moepic")
    whole, _ = chat.ask()
    lost, close = torch.AcceleratorError(LOST), Engine.close

    def closes_badly(engine: Engine) -> None:
        close(engine)
        raise lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", closes_badly)
        fail(patch, Engine, "load", lost, after=0)
        chat.load(chat.settings)
        assert "the GPU stopped working" in chat.notice
        _, note = chat.ask("anybody?")
        assert note == "no model is loaded; choose a checkpoint and press Load"
    chat.load(chat.settings)
    chat.beside = "{}"
    assert chat.ask()[0] == whole
    assert chat.talk.store.entries()[1].title == "what?"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_full_disk_while_packing_leaves_the_old_model(
    chat: Chat, checkpoints: Callable[..., Path], tmp_path: Path, when: str
) -> None:
    whole, _ = chat.ask()
    packed = tmp_path / "packed"
    with pytest.MonkeyPatch.context() as patch:
        if when == "at once":
            patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 0))
        else:
            fail(patch, os, "pwrite", OSError(errno.ENOSPC, "No space left on device"), after=5)
        chat.load(chat.settings.replace(checkpoint=str(checkpoints("mixtral")), link="disk", packed_dir=str(packed)))
    assert "cannot pack" in chat.notice
    assert "No space left on device; free some space or choose another folder with packed_dir" in chat.notice
    assert not list(packed.glob("*"))
    chat.beside = "{}"
    assert chat.ask()[0] == whole


def test_a_full_disk_does_not_stop_a_model_from_being_loaded(
    chat: Chat, checkpoints: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """What was measured is kept for the next start; there is no room for it."""
    caplog.set_level(logging.CRITICAL, "moepic")
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        for owner, name in ((Path, "write_text"), (Path, "mkdir"), (np, "savez_compressed")):
            fail(patch, owner, name, full, after=0)
        for _ in range(4):  # enough tokens to be kept
            chat.ask()
        chat.load(chat.settings.replace(checkpoint=str(checkpoints("mixtral"))))
    loaded = chat.state.look().loaded
    assert loaded is not None
    assert loaded.spec.model_type == "mixtral", chat.notice
