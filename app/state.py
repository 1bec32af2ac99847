"""The one engine that all tabs of the page share, and the lock around it. The only importer of the engine.

Panels ask it to load, to answer and to change the budget, and read what `look` says; nothing they get can change.
A model is loaded by a thread of its own, and answers are made by another, so that no request of the page waits for a
model and a stop is noticed within one layer. What goes wrong raises a MoepicError at once or becomes a `Notice` later;
conversation, settings and the model that answers now survive it.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal

from moepic_core import finder
from moepic_core.calibrate import probe
from moepic_core.checkpoint import read_spec
from moepic_core.errors import BadSettings, Cancelled, MoepicError, OutOfRoom
from moepic_core.events import Done, FinishReason, PromptRead, TokenMade
from moepic_core.events import Notice as EngineNotice
from moepic_core.folders import user_folder
from moepic_core.links import parse_link
from moepic_core.needs import needs_of
from moepic_core.planner import OF_EXPERTS, budget_bytes
from moepic_core.spec import MachineProfile, Plan, Settings
from moepic_core.telemetry import Telemetry
from moepic_core.units import parse_bytes
from moepic_core.verdict import judge

from . import checkpoints, conversation
from .nouns import Answer, Loaded, Look, Notice, Preview, Progress

if TYPE_CHECKING:  # importing the engine takes seconds, so the first load does that while the page is up already
    from moepic_core.engine import Engine
    from moepic_core.hf.text import Message

FORECAST_POINTS = 24  # budgets along the slider for which a plan is made
UPDATE_S = 0.045  # the browser needs 8 ms to draw an answer anew: about 20 times a second is smooth and cheap
CALM_TURNS = 5  # updates without news between two that are told nevertheless
NEED_A_LOAD = ("checkpoint", "device", "link", "dtype", "context_length")  # settings that only a load can change


class State:
    """See the module. `settings` are those of the command line; they hold until the page changes them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()  # held for looks and assignments only, never while something works
        self._engine: Engine | None = None
        self._loaded: Loaded | None = None
        self._loader: threading.Thread | None = None
        self._loads = 0
        self._progress: Progress | None = None
        self._notice: Notice | None = None
        self._num_notices = 0
        self._replying = threading.Lock()  # held by the one reply that is being made
        self._load_cancelled = threading.Event()
        self._known_forecast: tuple[object, tuple[tuple[int, float], ...]] | None = None
        self._closed = threading.Event()

    def look(self) -> Look:
        """All that is true now. Cheap; from any thread."""
        with self._lock:
            engine, loads, progress = self._engine, self._loads, self._progress
            notice, loaded = self._notice, self._loaded
        return Look(loads, progress, notice, loaded, engine.snapshot() if engine else None)

    @property
    def telemetry(self) -> Telemetry | None:
        """Of the loaded model: its events and trace, which say more than a snapshot. Readers change nothing."""
        engine = self._engine
        return None if engine is None else engine.residency.telemetry

    def tell(self, kind: Literal["error", "info"], text: str) -> None:
        """Shows `text` in every tab until something newer or better happens."""
        with self._lock:
            self._num_notices += 1
            self._notice = Notice(self._num_notices, kind, text)

    def check(self, settings: Settings) -> None:
        """Raises a MoepicError for what cannot work, as far as a glance shows it: names, units, headers."""
        parse_link(settings.link, probe(settings.device).device)
        if not str(settings.vram).endswith(("auto", "%", OF_EXPERTS)):
            parse_bytes(settings.vram)
        folder = checkpoints.folder(settings.checkpoint)
        if folder is not None:
            read_spec(folder, settings.dtype)

    def preview(self, settings: Settings) -> Preview:
        """What `settings` would need here; loads nothing. Raises a MoepicError when they cannot work at all."""
        with self._lock:
            engine, loaded = self._engine, self._loaded
        machine = probe(settings.device)
        if engine is not None:
            machine = _without(machine, engine)
        link = parse_link(settings.link, machine.device)
        if engine is not None and loaded is not None and is_same_model(settings, loaded.settings):
            verdict = judge(loaded.spec, loaded.needs, machine, settings.link)
            budget, notes = engine.plan.memory.budget, loaded.notes
            preview = Preview(loaded.settings, machine, link, loaded.spec, loaded.needs, verdict, budget, True, notes)
            return dataclasses.replace(preview, forecast=self._forecast(engine, preview))
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            return Preview(settings, machine, link)
        spec = read_spec(folder, settings.dtype)
        needs = needs_of(settings, spec, machine)
        verdict = judge(spec, needs, machine, settings.link)
        preview = Preview(settings, machine, link, spec, needs, verdict)
        if verdict.step == "will not run":
            return preview
        return dataclasses.replace(preview, budget_bytes=budget_bytes(settings.vram, needs, preview.free_bytes))

    def _forecast(self, engine: Engine, preview: Preview) -> tuple[tuple[int, float], ...]:
        """Predicted seconds of a token along the whole slider, planned anew when what is known has grown by a lot."""
        settings, session = preview.settings, engine.snapshot().session.decode
        tokens = int(session.activations[0].sum()) // max(1, engine.spec.top_k)
        key = (self._loads, settings.replace(vram="auto"), tokens.bit_length())
        if self._known_forecast is None or self._known_forecast[0] != key:
            low, high = engine.needs.smallest, min(engine.needs.everything, preview.free_bytes)
            step = max(1, (high - low) // (FORECAST_POINTS - 1))
            budgets = range(low, low + FORECAST_POINTS * step, step)
            found = engine.steering.forecast(settings, budgets)
            self._known_forecast = key, tuple((budget, cost.total_s) for budget, cost in found)
        return self._known_forecast[1]

    def load(self, settings: Settings) -> None:
        """Starts to load and returns. When that fails, the model from before answers again and a notice says why."""
        with self._lock:
            if self._loader is not None:
                raise BadSettings("a model is being loaded already; wait for it or cancel it")
            self._notice = None
            self._progress = Progress("loading", settings.checkpoint)
            self._load_cancelled.clear()
            self._loader = threading.Thread(target=self._load, args=(settings,), name="load", daemon=True)
            self._loader.start()

    def cancel_load(self) -> None:
        self._load_cancelled.set()

    def wait(self) -> None:
        """Until no model is being loaded."""
        loader = self._loader
        if loader is not None:
            loader.join()

    def reply(
        self,
        messages: Sequence[Message],
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        stopped: Callable[[], bool],
        **sampling: Any,
    ) -> Iterator[Answer]:
        """The answer so far, again and again as it grows, until it is complete or `stopped` says so.

        One reply at a time: others wait for their turn. Now and then the text comes without being longer: closing the
        iterator between two texts stops the engine too, also while a long prompt is read. `sampling` are further fields
        of the engine's `Sampling`. Raises a MoepicError.
        """
        self._ready_engine()
        while not self._replying.acquire(timeout=UPDATE_S):
            if stopped():
                yield Answer(reason="stopped")
                return
            yield Answer(waits=True)
        try:
            values = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, **sampling}
            yield from self._answer(messages, values, stopped)
        finally:
            self._replying.release()

    def _answer(
        self, messages: Sequence[Message], values: dict[str, Any], stopped: Callable[[], bool]
    ) -> Iterator[Answer]:
        from moepic_core.hf.text import Sampling

        engine, sampling = self._ready_engine(), Sampling(**values)
        prompt: Any = messages if engine.text.has_chat_template else conversation.as_text(messages)
        pieces: list[str] = []
        closed = threading.Event()  # the engine forgets a stop that comes before the reply has begun; this does not
        now = Answer()
        reason: FinishReason = "stopped"

        def work() -> None:
            nonlocal now, reason
            for event in engine.generate(prompt, sampling):
                if closed.is_set():
                    return
                if isinstance(event, TokenMade):
                    pieces.append(event.text)
                elif isinstance(event, PromptRead):
                    now = dataclasses.replace(now, read_tokens=event.read, prompt_tokens=event.total)
                elif isinstance(event, EngineNotice):
                    self.tell("info", event.text)
                elif isinstance(event, Done):
                    reason = event.reason

        num_shown = 0
        with ThreadPoolExecutor(1, "reply") as thread:
            working = thread.submit(work)
            try:
                for turn in itertools.count():
                    done = bool(wait([working], UPDATE_S).done)
                    if stopped() and not closed.is_set():
                        closed.set()
                        engine.request_stop()
                    if num_shown < len(pieces) or turn % CALM_TURNS == 0:
                        num_shown = len(pieces)
                        yield dataclasses.replace(now, text="".join(pieces[:num_shown]))
                    if done and num_shown == len(pieces):
                        break
                working.result()
                figures = engine.snapshot().reply
                yield dataclasses.replace(now, text="".join(pieces), reason=reason, figures=figures)
            finally:
                closed.set()
                engine.request_stop()

    def stop(self) -> None:
        """Ends the running answer within one layer."""
        engine = self._engine
        if engine is not None:
            engine.request_stop()

    def reconfigure(self, **changes: Any) -> Plan:
        """Changes budget or strategy of the loaded model, also while it answers. Raises a MoepicError."""
        engine = self._ready_engine()
        plan = engine.reconfigure(**changes)
        with self._lock:
            if engine is self._engine and self._loaded is not None:
                settings = self._loaded.settings.replace(**changes)
                self._loaded = dataclasses.replace(self._loaded, settings=settings)
        return plan

    def clear_notice(self) -> None:
        """What was wrong is not any more, or the user tries something else."""
        self._notice = None

    def close(self) -> None:
        """Stops what runs and unloads the model."""
        self._closed.set()
        self._load_cancelled.set()
        self.wait()
        self._unload()

    def _ready_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise BadSettings("no model is loaded; choose a checkpoint and press Load")
        return engine

    def _load(self, settings: Settings) -> None:
        failure: str | None = "loading failed for a reason of our own; the console shows it"
        try:
            self._replace(settings)
            failure = None
        except Cancelled:
            failure = f"{settings.checkpoint} was not loaded: cancelled"
        except MoepicError as error:
            failure = str(error)
        finally:
            if failure is not None:
                self.tell("error", failure)
            with self._lock:
                self._progress = self._loader = None

    def _replace(self, settings: Settings) -> None:
        """Unloads the old model only when the new one looks good; brings it back if the new one fails nevertheless."""
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            folder = finder.resolve(settings.checkpoint, settings.revision, self._counter("downloading", settings))
        preview = self.preview(settings)
        assert preview.needs is not None, folder
        assert preview.verdict is not None, folder
        if preview.verdict.step == "will not run":
            raise OutOfRoom(f"{settings.checkpoint} {preview.verdict.text}")
        budget_bytes(settings.vram, preview.needs, preview.free_bytes)  # refuses a budget that is too small
        before = self._unload()
        try:
            self._bring(settings, str(folder), self._load_cancelled)
        except BaseException:
            if before is not None:
                self._bring(before.settings, before.spec.path, self._closed)
            raise

    def _unload(self) -> Loaded | None:
        with self._lock:
            engine, before = self._engine, self._loaded
            self._engine = self._loaded = None
        if engine is not None:
            engine.close()
        return before

    def _bring(self, settings: Settings, folder: str, cancelled: threading.Event) -> None:
        from moepic_core.calibration import calibrate
        from moepic_core.engine import Engine

        local = settings.replace(checkpoint=folder)
        engine = Engine.load(local, self._counter("loading", settings), cancelled.is_set, user_folder())
        if engine.steering.costs is None:  # once per checkpoint and machine: later starts remember
            try:
                calibrate(engine, self._measuring(engine, settings, cancelled))
            except BaseException:
                engine.close()
                raise
        loaded = Loaded(
            settings,
            engine.spec,
            engine.machine,
            engine.link,
            engine.needs,
            engine.text.has_chat_template,
            tuple(engine.notices),
        )
        with self._lock:
            self._engine, self._loaded = engine, loaded
            self._loads += 1

    def _measuring(self, engine: Engine, settings: Settings, cancelled: threading.Event) -> Callable[[float], None]:
        def tell(share: float) -> None:
            if cancelled.is_set():
                raise Cancelled("the measurement was cancelled")
            self._progress = Progress("measuring", settings.checkpoint, int(1000 * share), 1000)

        return tell

    def _counter(self, kind: Literal["downloading", "loading"], settings: Settings) -> Callable[[int, int], None]:
        def count(done_bytes: int, total_bytes: int) -> None:
            if kind == "downloading" and self._load_cancelled.is_set():
                raise Cancelled("the download was cancelled")
            self._progress = Progress(kind, settings.checkpoint, done_bytes, total_bytes)

        return count


def is_same_model(one: Settings, other: Settings) -> bool:
    """Whether changing from `one` to `other` needs no loading."""
    return all(getattr(one, name) == getattr(other, name) for name in NEED_A_LOAD)


def _without(machine: MachineProfile, engine: Engine) -> MachineProfile:
    """`machine` as it would be if the loaded model were gone: what it holds is added, up to what was free before it."""
    device = engine.residency.arena.used_bytes
    host = 0 if engine.link.kind == "disk" else engine.spec.expert_bytes
    if machine.device == "cpu":
        device = host = device + host
    before = engine.machine
    return dataclasses.replace(
        machine,
        device_free_bytes=max(
            machine.device_free_bytes, min(before.device_free_bytes, machine.device_free_bytes + device)
        ),
        host_free_bytes=max(machine.host_free_bytes, min(before.host_free_bytes, machine.host_free_bytes + host)),
    )
