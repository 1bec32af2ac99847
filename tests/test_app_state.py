"""The one engine behind the page: loading, failing, answering, stopping, changing the budget. No browser."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import checkpoints, demo_checkpoint
from app.nouns import Look
from app.settings_store import SettingsStore
from app.state import State
from moepic_core.engine import Engine
from moepic_core.errors import BadCheckpoint, BadSettings, Cancelled, OutOfRoom
from moepic_core.extras import suggested_prompts
from moepic_core.spec import Settings

CONTEXT = 256
QUESTION = [{"role": "user", "content": "what?"}]


def settings_for(folder: Path | str, **values: Any) -> Settings:
    return Settings.create(
        **{"checkpoint": str(folder), "device": "cpu", "link": "emulated:50MB/s", "context_length": CONTEXT, **values}
    )


@pytest.fixture
def state(checkpoints: Callable[..., Path]) -> Iterator[State]:
    state = State(settings_for(checkpoints("qwen3_moe")))
    yield state
    state.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("moepic", "reply", "load"))]


def loaded(state: State) -> State:
    state.load(state.settings)
    state.wait()
    assert state.look().notice is None
    return state


def greedy(state: State, max_new_tokens: int = 24, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
    return (answer.text for answer in state.reply(QUESTION, 0.0, 1.0, max_new_tokens, stopped))


def test_before_the_first_load_there_is_nothing(state: State) -> None:
    assert state.look() == Look(0, None, None, None, None)
    state.stop()
    for action in (lambda: next(greedy(state)), lambda: state.reconfigure(vram="50%")):
        with pytest.raises(BadSettings, match="no model is loaded"):
            action()


def test_a_load_counts_bytes_and_ends_ready(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    loader = state._loader
    count = loader._counter("loading", state.settings)
    monkeypatch.setattr(
        loader, "_counter", lambda *_: lambda *bytes_: (count(*bytes_), seen.append(state.look().progress))
    )
    loaded(state)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes > 0
    look = state.look()
    assert (look.loads, look.progress) == (1, None)
    assert look.loaded is not None
    assert look.snapshot is not None
    assert look.snapshot.phase == "idle"


def test_the_answer_grows(state: State) -> None:
    texts = list(greedy(loaded(state)))
    assert len(set(texts)) > 1
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(texts))
    assert list(greedy(state))[-1] == texts[-1]


def test_a_hopeless_budget_is_refused_before_anything_is_served(state: State) -> None:
    state.check(state.settings.replace(vram="auto"))
    state.check(state.settings.replace(vram="1%"))  # loading says what is wrong with it
    with pytest.raises(OutOfRoom, match=r"a budget of 100 kB is too small for this model: the smallest is .* bytes: "):
        state.check(state.settings.replace(vram="100kB"))


@pytest.mark.parametrize("before", [False, True])
def test_a_load_that_cannot_work_leaves_the_old_model_alone(
    state: State, tmp_path: Path, checkpoints: Callable[..., Path], caplog: pytest.LogCaptureFixture, before: bool
) -> None:
    answer = list(greedy(loaded(state)))[-1] if before else None
    engine = state._engine
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints("qwen3_moe"), damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    for folder, words in ((tmp_path / "absent", "neither a folder nor a hub id"), (damaged, "model.safetensors")):
        state.load(settings_for(folder))
        state.wait()
        notice = state.look().notice
        assert notice is not None
        assert notice.kind == "error"
        assert words in notice.text
    caplog.clear()
    state.load(state.settings.replace(vram=1000))
    state.wait()
    words = f"{state.settings.checkpoint} was not loaded: a budget of 1 kB is too small"
    assert state.look().notice.text.startswith(words)  # type: ignore[union-attr]
    assert [record.getMessage() for record in caplog.records] == [state.look().notice.text]  # type: ignore[union-attr]
    assert state._engine is engine
    assert state.look().loads == int(before)
    if before:
        assert list(greedy(state))[-1] == answer


@pytest.mark.parametrize("error", [OutOfRoom("no memory left"), Cancelled("stop"), ValueError("our mistake")])
def test_when_reading_weights_fails_the_old_model_comes_back(
    state: State, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    answer = list(greedy(loaded(state)))[-1]
    mixtral, load = str(checkpoints("mixtral")), Engine.load

    def failing(settings: Settings, *rest: Any) -> Engine:
        if settings.checkpoint == mixtral:
            raise error
        return load(settings, *rest)

    monkeypatch.setattr(Engine, "load", failing)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    state.load(settings_for(mixtral))
    state.wait()
    look = state.look()
    assert look.loaded is not None
    assert look.loaded.settings == state.settings
    assert look.notice is not None
    expected = {OutOfRoom: "no memory left", Cancelled: "cancelled", ValueError: "the console shows it"}
    assert expected[type(error)] in look.notice.text
    assert list(greedy(state))[-1] == answer


def test_another_model_takes_over(state: State, checkpoints: Callable[..., Path]) -> None:
    first = loaded(state)._engine
    state.load(settings_for(checkpoints("mixtral"), link="disk", packed_dir=str(checkpoints("mixtral").parent)))
    state.wait()
    look = state.look()
    assert look.notice is None
    assert look.loaded is not None
    assert look.loaded.spec.model_type == "mixtral"
    assert first is not None
    assert first.turn.closed


def test_one_load_at_a_time_and_it_can_be_cancelled(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def slow(settings: Settings, progress: Any, cancelled: Callable[[], bool], *_: object) -> Engine:
        begun.set()
        while not cancelled():
            time.sleep(0.001)
        raise Cancelled("loading was cancelled")

    monkeypatch.setattr(Engine, "load", slow)
    state.load(state.settings)
    assert begun.wait(10)
    with pytest.raises(BadSettings, match="being loaded already"):
        state.load(state.settings)
    state.cancel_load()
    state.wait()
    look = state.look()
    assert (look.loaded, look.progress) == (None, None)
    assert "was not loaded: cancelled" in look.notice.text  # type: ignore[union-attr]


def words(answer: Iterator[str]) -> str:
    """The first text that is not empty."""
    return next(text for text in answer if text)


def test_closing_the_answer_stops_the_engine(state: State) -> None:
    answer = greedy(loaded(state), max_new_tokens=CONTEXT)
    text = words(answer)
    answer.close()  # type: ignore[attr-defined]
    assert 1 <= num_tokens(state) < 100
    assert list(greedy(state, max_new_tokens=CONTEXT))[-1].startswith(text)


def test_closing_works_while_the_prompt_is_read(state: State) -> None:
    state.settings = state.settings.replace(link="emulated:200kB/s", vram="87.5%")
    answer = greedy(loaded(state))
    assert next(answer) == ""
    begin_s = time.monotonic()
    answer.close()  # type: ignore[attr-defined]
    assert num_tokens(state) == 0
    assert time.monotonic() - begin_s < 1


@pytest.mark.parametrize("sooner", [True, False])
def test_a_stop_ends_the_answer_and_keeps_its_text(state: State, sooner: bool) -> None:
    stop = threading.Event()
    if sooner:
        stop.set()
    answer = greedy(loaded(state), CONTEXT, stop.is_set)
    first = "" if sooner else words(answer)
    stop.set()
    texts = [first, *answer]
    assert texts[-1].startswith(first)
    assert num_tokens(state) < 100


def num_tokens(state: State) -> int:
    """New tokens of the last reply, which has ended."""
    snapshot = state.look().snapshot
    assert snapshot is not None
    assert snapshot.phase == "idle"
    return snapshot.reply.new_tokens if snapshot.reply is not None else 0


def test_the_budget_changes_while_the_model_answers_and_the_answer_does_not(state: State) -> None:
    expected = list(greedy(loaded(state), max_new_tokens=60))[-1]
    answer = greedy(state, max_new_tokens=60)
    texts = [words(answer)]
    small = state.reconfigure(vram="90%").memory
    texts.append(next(answer))
    whole = state.reconfigure(vram="100%").memory
    texts += answer
    assert small.cache < whole.cache
    assert texts[-1] == expected
    assert state.look().loaded.settings.vram == "100%"  # type: ignore[union-attr]
    with pytest.raises(OutOfRoom, match="too small"):
        state.reconfigure(vram=1000)
    assert state.preview(state.settings).budget_bytes == whole.budget


def test_a_prompt_that_is_too_long_costs_the_answer_only(state: State) -> None:
    loaded(state)
    with pytest.raises(BadSettings, match="leaves no room in a context of 256"):
        list(state.reply([{"role": "user", "content": "long " * CONTEXT}], 0.0, 1.0, 8, lambda: False))
    assert list(greedy(state))


def test_a_reply_tells_how_far_it_is_and_why_it_ended(state: State) -> None:
    state.settings = state.settings.replace(prefill_chunk=16)
    messages = [{"role": "user", "content": "word " * 50}]
    answers = list(loaded(state).reply(messages, 0.0, 1.0, 6, lambda: False, top_k=5))
    read = [answer.read_tokens for answer in answers]
    assert read == sorted(read)
    last = answers[-1]
    assert last.read_tokens == last.prompt_tokens > 50
    assert {answer.reason for answer in answers[:-1]} == {None}
    assert last.reason in ("length", "stop")
    assert last.figures is not None
    assert last.figures.ttft_s is not None
    stopped = list(state.reply(messages, 0.0, 1.0, CONTEXT, lambda: True))
    assert stopped[-1].reason == "stopped"
    with pytest.raises(BadSettings, match="top_k -1 is out of range"):
        list(state.reply(messages, 0.0, 1.0, 6, lambda: False, top_k=-1))


def test_a_question_waits_for_the_model_that_is_being_loaded(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, bring = threading.Event(), state._loader._bring

    def late(*arguments: Any) -> None:
        may_load.wait()
        bring(*arguments)

    monkeypatch.setattr(state._loader, "_bring", late)
    state.load(state.settings)
    reply = state.reply(QUESTION, 0.0, 1.0, 4, lambda: False)
    assert next(reply).waits == "the model (loading)"
    assert [answer.reason for answer in state.reply(QUESTION, 0.0, 1.0, 4, lambda: True)] == ["stopped"]
    may_load.set()
    *_, last = reply
    assert (last.reason, last.waits) == ("length", "") and last.text


def test_one_reply_waits_for_the_other(state: State) -> None:
    first = loaded(state).reply(QUESTION, 0.0, 1.0, CONTEXT, lambda: False)
    next(first)
    stop = threading.Event()
    second = state.reply(QUESTION, 0.0, 1.0, 4, stop.is_set)
    assert next(second).waits
    impatient = state.reply(QUESTION, 0.0, 1.0, 4, lambda: True)
    assert [answer.reason for answer in impatient] == ["stopped"]
    first.close()  # type: ignore[attr-defined]
    answers = list(second)
    assert answers[-1].reason == "length"
    assert answers[-1].text


def test_without_a_chat_template_the_text_is_continued(tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
    folder = tmp_path / "base"
    shutil.copytree(checkpoints("qwen3_moe"), folder)
    for file in folder.glob("*.jinja"):
        file.unlink()
    state = loaded(State(settings_for(folder)))
    try:
        assert "continues your text" in state.preview(state.settings).notes[-1]
        assert list(greedy(state))
    finally:
        state.close()


def test_a_preview_loads_nothing_and_agrees_with_the_load(state: State) -> None:
    before = state.preview(state.settings)
    assert state.look().loaded is None
    assert before.needs is not None
    after = loaded(state).preview(state.settings)
    assert after.loaded
    assert after.needs is not None
    assert abs(after.needs.everything - before.needs.everything) < 0.05 * before.needs.everything
    assert after.budget_bytes == state._engine.plan.memory.budget  # type: ignore[union-attr]


def test_what_a_preview_refuses(state: State, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        state.preview(settings_for(tmp_path))
    with pytest.raises(BadSettings, match="'pigeon' is unknown"):
        state.preview(state.settings.replace(link="pigeon"))
    assert state.preview(settings_for("some/hub-id")).spec is None


def test_closing_in_the_middle_of_everything(checkpoints: Callable[..., Path]) -> None:
    state = loaded(State(settings_for(checkpoints("qwen3_moe"))))
    answer = greedy(state, max_new_tokens=CONTEXT)
    next(answer)
    state.close()
    assert state.look().loaded is None
    list(answer)


def test_the_demo_checkpoint_is_made_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path))
    state = loaded(State(settings_for(demo_checkpoint.NAME, vram="50%")))
    try:
        words = " ".join(list(greedy(state, max_new_tokens=12))[-1].split())
        assert words.split()
        assert set(words.split()) <= set(demo_checkpoint.WORDS.split())
    finally:
        state.close()
    monkeypatch.setattr(demo_checkpoint, "make", lambda folder: pytest.fail("made twice"))
    assert demo_checkpoint.demo_checkpoint() == tmp_path / "checkpoints" / demo_checkpoint.NAME


def test_a_demo_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path / "file"))
    with pytest.raises(OutOfRoom, match="give a --checkpoint, or set MOEPIC_HOME"):
        demo_checkpoint.demo_checkpoint()


def test_the_bundled_model_is_the_default_and_knows_its_facts() -> None:
    settings = SettingsStore(None, {"device": "cpu", "link": "emulated:2GB/s"}).of(checkpoints.default_name())
    assert settings.checkpoint == str(checkpoints.BUNDLED)
    state = loaded(State(settings))
    try:
        question = [{"role": "user", "content": "What is a split ratio?"}]
        *_, last = state.reply(question, 0.0, 1.0, 120, lambda: False)
        assert "may stay in VRAM as its top" in last.text
        look = state.look()
        assert look.loaded is not None
        assert look.loaded.spec.num_parameters < 20_000_000
        prompts = suggested_prompts(Path(look.loaded.spec.path))
        assert prompts[0] == "What is a split ratio?"
    finally:
        state.close()
