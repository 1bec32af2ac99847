"""The one engine that all tabs of the page share, and the lock around it. The only importer of the engine.

Panels ask it to load, to answer and to change the budget, and read what `look` says; nothing they get is mutable.
A model is loaded by a thread of its own, and answers are made by another, so that no request of the page waits for a
model and a stop is noticed within one layer. What goes wrong becomes a `Notice`; conversation and settings stay.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moepic_core import finder
from moepic_core.calibrate import HEADROOM, probe
from moepic_core.checkpoint import read_spec
from moepic_core.errors import BadSettings, Cancelled, MoepicError
from moepic_core.events import Notice as EngineNotice
from moepic_core.events import TokenMade
from moepic_core.links import Link, parse_link
from moepic_core.metrics import Snapshot
from moepic_core.planner import Needs, budget_bytes, uniform_plan
from moepic_core.spec import MachineProfile, ModelSpec, Plan, Settings
from moepic_core.verdict import Verdict, judge

from . import checkpoints

if TYPE_CHECKING:  # importing the engine takes seconds, so the first load does it, while the page is up already
    from moepic_core.engine import Engine
    from moepic_core.hf.text import Message

UPDATE_S = 0.045  # the browser needs 8 ms to draw an answer anew: about 20 times a second is smooth and cheap
RELOADED = ("checkpoint", "device", "link", "dtype", "context_length")  # settings that only a load changes


@dataclass(frozen=True)
class Progress:
    """A model on its way."""

    kind: Literal["downloading", "loading"]
    name: str
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Notice:
    """Something that the user should read. The newest replaces the one before."""

    number: int
    kind: Literal["error", "info"]
    text: str


@dataclass(frozen=True)
class Loaded:
    """The model that answers now."""

    settings: Settings
    spec: ModelSpec
    machine: MachineProfile
    link: Link
    needs: Needs
    has_chat_template: bool
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """All that is true at one instant. `snapshot` is there when `loaded` is."""

    loads: int  # grows when a load ends, well or not: a page that sees it change reads its choices again
    progress: Progress | None
    notice: Notice | None
    loaded: Loaded | None
    snapshot: Snapshot | None


@dataclass(frozen=True)
class Preview:
    """What a checkpoint would need on this machine, from its headers alone or, when it is loaded, as measured."""

    settings: Settings
    machine: MachineProfile  # with what the loaded model would give back counted as free
    link: Link
    verdict: Verdict | None  # None: the checkpoint is not on this machine yet
    spec: ModelSpec | None = None
    needs: Needs | None = None
    budget_bytes: int | None = None  # None: no budget works
    notes: tuple[str, ...] = ()

    @property
    def largest_bytes(self) -> int:
        """The largest budget that makes sense: everything, or what is free."""
        assert self.needs is not None
        return min(self.needs.everything, int(self.machine.device_free_bytes * HEADROOM))

    def plan(self, budget: int) -> Plan:
        assert self.needs is not None
        return uniform_plan(self.settings, self.needs, budget)


class State:
    """See the module. `settings` are those of the command line; they hold until the page changes them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()  # for the fields below; held for assignments only
        self._engine: Engine | None = None
        self._loaded: Loaded | None = None
        self._progress: Progress | None = None
        self._loader: threading.Thread | None = None
        self._loads = 0
        self._cancelled = threading.Event()
        self._notice: Notice | None = None
        self._num_notices = 0

    def look(self) -> Look:
        with self._lock:
            engine, loads, progress = self._engine, self._loads, self._progress
            notice, loaded = self._notice, self._loaded
        return Look(loads, progress, notice, loaded, engine.snapshot() if engine else None)

    def tell(self, kind: Literal["error", "info"], text: str) -> None:
        with self._lock:
            self._num_notices += 1
            self._notice = Notice(self._num_notices, kind, text)

    def preview(self, settings: Settings) -> Preview:
        """What `settings` would need here. Raises a MoepicError when their checkpoint cannot be used at all."""
        with self._lock:
            loaded, engine = self._loaded, self._engine
        machine = probe(settings.device)
        if engine is not None:
            machine = _without(machine, engine)
        link = parse_link(settings.link, machine.device)
        if loaded is not None and engine is not None and _same_model(settings, loaded.settings):
            notes = list(loaded.notices)
            if not loaded.has_chat_template:
                notes.append("no chat template: it continues your text instead of answering")
            verdict = judge(loaded.spec, loaded.needs, machine, settings.link)
            budget = engine.plan.memory.budget
            return Preview(settings, machine, link, verdict, loaded.spec, loaded.needs, budget, tuple(notes))
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            return Preview(settings, machine, link, None)
        spec = read_spec(folder, settings.dtype)
        needs = _needs_of(settings, spec, machine)
        verdict = judge(spec, needs, machine, settings.link)
        budget = None
        if verdict.step != "will not run":
            budget = budget_bytes(settings.vram, needs, int(machine.device_free_bytes * HEADROOM))
        return Preview(settings, machine, link, verdict, spec, needs, budget)

    def load(self, settings: Settings) -> None:
        """Starts to load; returns at once. When it fails, the model from before answers again and a notice says why."""
        with self._lock:
            if self._loader is not None:
                raise BadSettings("a model is being loaded already; wait for it or cancel it")
            self._notice = None
            self._cancelled.clear()
            self._progress = Progress("loading", settings.checkpoint)
            self._loader = threading.Thread(target=self._load, args=(settings,), name="load", daemon=True)
            self._loader.start()

    def cancel_load(self) -> None:
        self._cancelled.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until no model is being loaded."""
        loader = self._loader
        if loader is not None:
            loader.join(timeout_s)

    def reply(
        self, messages: Sequence[Message], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        """The answer so far, again and again as it grows. Closing the iterator stops it. Raises a MoepicError."""
        from moepic_core.hf.text import Sampling

        engine = self._ready_engine()
        with self._lock:
            self._notice = None
        sampling = Sampling(max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p)
        prompt = messages if engine.text.has_chat_template else "\n\n".join(message["content"] for message in messages)
        box: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                for event in engine.generate(prompt, sampling):
                    if isinstance(event, TokenMade):
                        box.put(event.text)
                    elif isinstance(event, EngineNotice):
                        self.tell("info", event.text)
                box.put(None)
            except BaseException as error:  # handed over to whoever reads the answer, and raised there
                box.put(error)

        worker = threading.Thread(target=work, name="reply", daemon=True)
        worker.start()
        try:
            yield from _gathered(box)
        finally:
            engine.request_stop()
            worker.join()

    def stop(self) -> None:
        """Ends the running answer within one layer."""
        engine = self._engine
        if engine is not None:
            engine.request_stop()

    def reconfigure(self, **changes: object) -> Plan:
        """Changes budget or strategy of the loaded model, also while it answers. Raises a MoepicError."""
        engine = self._ready_engine()
        plan = engine.reconfigure(**changes)
        with self._lock:
            self._notice = None
            if engine is self._engine and self._loaded is not None:
                self._loaded = dataclasses.replace(self._loaded, settings=engine.settings)
        return plan

    def close(self) -> None:
        """Stops what runs and unloads."""
        self._cancelled.set()
        self.wait()
        with self._lock:
            engine, self._engine, self._loaded = self._engine, None, None
        if engine is not None:
            engine.close()

    def _ready_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise BadSettings("no model is loaded yet; choose a checkpoint and press Load")
        return engine

    def _load(self, settings: Settings) -> None:
        failure: str | None = "the model could not be loaded for a reason that only the console shows"
        try:
            self._replace(settings)
            failure = None
        except Cancelled:
            failure = f"loading {settings.checkpoint} was cancelled"
        except MoepicError as error:
            failure = str(error)
        finally:
            with self._lock:
                self._progress = self._loader = None
                self._loads += 1
            if failure is not None:
                self.tell("error", failure)

    def _replace(self, settings: Settings) -> None:
        """Unloads the old model only when the new one is known to fit, and brings it back if the new one fails."""
        local = settings.replace(checkpoint=str(self._fetch(settings)))
        preview = self.preview(local)
        if preview.verdict is not None and preview.verdict.step == "will not run":
            raise BadSettings(f"{settings.checkpoint} {preview.verdict.text}")
        with self._lock:
            old, before = self._engine, self._loaded
            self._engine = self._loaded = None
        if old is not None:
            old.close()
        try:
            self._bring(settings, local, self._cancelled.is_set)
        except BaseException:
            if before is not None:
                self._bring(before.settings, before.settings.replace(checkpoint=before.spec.path), None)
            raise

    def _fetch(self, settings: Settings) -> str:
        """The folder of the checkpoint, downloaded if need be."""
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            folder = finder.resolve(settings.checkpoint, settings.revision, self._counter("downloading", settings))
        return str(folder)

    def _bring(self, settings: Settings, local: Settings, cancelled: Callable[[], bool] | None) -> None:
        from moepic_core.engine import Engine

        engine = Engine.load(local, self._counter("loading", settings), cancelled)
        loaded = Loaded(
            engine.settings.replace(checkpoint=settings.checkpoint),
            engine.spec,
            engine.machine,
            engine.link,
            engine.needs,
            engine.text.has_chat_template,
            tuple(engine.notices),
        )
        with self._lock:
            self._engine, self._loaded = engine, loaded

    def _counter(self, kind: Literal["downloading", "loading"], settings: Settings) -> Callable[[int, int], None]:
        def count(done: int, total: int) -> None:
            if self._cancelled.is_set() and kind == "downloading":
                raise Cancelled("the download was cancelled")
            self._progress = Progress(kind, settings.checkpoint, done, total)

        return count


def _gathered(box: queue.SimpleQueue[str | BaseException | None]) -> Iterator[str]:
    """The text so far, at most once per UPDATE_S, until None ends it. Raises what comes instead of text."""
    text, shown, shown_s = "", "", 0.0
    ended = False
    while not ended:
        item = box.get()
        while True:
            if isinstance(item, BaseException):
                if text != shown:
                    yield text
                raise item
            if item is None:
                ended = True
                break
            text += item
            left_s = shown_s + UPDATE_S - time.monotonic()
            try:
                item = box.get(timeout=left_s) if left_s > 0 else box.get_nowait()
            except queue.Empty:
                break
        if text != shown:
            yield text
            shown, shown_s = text, time.monotonic()


def _same_model(one: Settings, other: Settings) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in RELOADED)


def _needs_of(settings: Settings, spec: ModelSpec, machine: MachineProfile) -> Needs:
    from moepic_core.engine import needs_of

    return needs_of(settings, spec, machine)


def _without(machine: MachineProfile, engine: Engine) -> MachineProfile:
    """`machine` as it would be if the loaded model were gone."""
    device = engine.residency.arena.used_bytes
    host = 0 if engine.link.kind == "disk" else engine.spec.expert_bytes
    if machine.device == "cpu":
        device = host = device + host
    return dataclasses.replace(
        machine,
        device_free_bytes=min(machine.device_total_bytes, machine.device_free_bytes + device),
        host_free_bytes=min(machine.host_total_bytes, machine.host_free_bytes + host),
    )
