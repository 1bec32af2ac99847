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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepic_core import finder
from moepic_core.calibrate import probe
from moepic_core.checkpoint import read_spec
from moepic_core.errors import BadSettings, Cancelled, OutOfRoom
from moepic_core.events import Done, FinishReason, PromptRead, TokenMade
from moepic_core.events import Notice as EngineNotice
from moepic_core.folders import user_folder
from moepic_core.links import parse_link
from moepic_core.planner import OF_EXPERTS, Needs
from moepic_core.spec import Plan, Settings
from moepic_core.telemetry import Telemetry
from moepic_core.units import parse_bytes

from . import checkpoints, conversation
from .faults import explained
from .nouns import Answer, Loaded, Look, Notice, Preview, Progress
from .previews import Held, Previews, fitted_budget
from .settings_store import SettingsStore

if TYPE_CHECKING:  # importing the engine takes seconds, so the first load does that while the page is up already
    from moepic_core.ablation import Row
    from moepic_core.engine import Engine
    from moepic_core.hf.text import Message
    from moepic_core.steering import Steering

UPDATE_S = 0.045  # the browser needs 8 ms to draw an answer anew: about 20 times a second is smooth and cheap
CALM_TURNS = 5  # updates without news between two that are told nevertheless
LEAST_BUDGET = 1.05  # of the smallest budget, when the verdict says no: loading finds a little more than headers say


class State:
    """See the module. `settings` are those of the start; `kept` has those of every checkpoint, from then on."""

    def __init__(self, settings: Settings, kept: SettingsStore | None = None) -> None:
        self.settings = settings
        self.kept = kept or SettingsStore(given=differing(settings))
        self._previews = Previews(self._changed)
        self._lock = threading.Lock()  # held for looks and assignments only, never while something works
        self._engine: Engine | None = None
        self._loaded: Loaded | None = None
        self._loader: threading.Thread | None = None
        self._loads = 0
        self._changes = 0
        self._progress: Progress | None = None
        self._notice: Notice | None = None
        self._num_notices = 0
        self._replying = threading.Lock()  # held by the one reply that is being made
        self.comparing = False  # settings; then none can change
        self._load_cancelled = threading.Event()
        self._closed = threading.Event()

    def look(self) -> Look:
        """All that is true now. Cheap; from any thread."""
        with self._lock:
            engine, loads, progress, changes = self._engine, self._loads, self._progress, self._changes
            notice, loaded = self._notice, self._loaded
        return Look(loads, progress, notice, loaded, engine.snapshot() if engine else None, changes)

    def _changed(self) -> None:
        """Tells every tab that a preview may say something else now."""
        with self._lock:
            self._changes += 1

    @property
    def telemetry(self) -> Telemetry | None:
        """Of the loaded model: its events and trace, which say more than a snapshot. Readers change nothing."""
        engine = self._engine
        return None if engine is None else engine.residency.telemetry

    @property
    def steering(self) -> Steering | None:
        """Of the loaded model: measured costs, known routing and forecasts. Readers change nothing."""
        engine = self._engine
        return None if engine is None else engine.steering

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
        return self._previews.of(settings, self._held(), self.kept.reserved_bytes)

    def _held(self) -> Held | None:
        with self._lock:
            engine, loaded = self._engine, self._loaded
        if engine is None or loaded is None:
            return None
        used = int(engine.snapshot().session.decode.activations[0].sum())
        in_host = 0 if engine.link.kind == "disk" else engine.spec.expert_bytes
        return Held(
            loaded, engine.plan, engine.steering, used // max(1, engine.spec.top_k), engine.residency.arena.used_bytes,
            in_host,
        )  # fmt: skip

    def load(self, settings: Settings, anyway: bool = False) -> None:
        """Starts to load and returns. When that fails, the model from before answers again and a notice says why.

        `anyway`: also when the verdict says that it will not run, with a budget as small as possible.
        """
        with self._lock:
            if self._loader is not None:
                raise BadSettings("a model is being loaded already; wait for it or cancel it")
            self._notice = None
            self._progress = Progress("loading", settings.checkpoint)
            self._load_cancelled.clear()
            self._loader = threading.Thread(target=self._load, args=(settings, anyway), name="load", daemon=True)
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
                error = working.exception()
                if error is not None:
                    raise explained(error) from error
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

    def compare(self, messages: Sequence[Message], tell: Callable[[float, str], None]) -> list[Row]:
        """What `messages` cost under the present settings and with parts switched off; see the core's `comparison`.

        Refused with BadSettings while an answer is made; until it ends answers wait and settings stay as they are.
        """
        from moepic_core.comparison import compare

        engine = self._ready_engine()
        if not self._replying.acquire(blocking=False):
            raise BadSettings("an answer is being written; stop it or wait until it is complete, then compare")
        try:
            self.comparing = True
            prompt: Any = messages if engine.text.has_chat_template else conversation.as_text(messages)
            return compare(engine, prompt, tell)
        finally:
            self.comparing = False
            self._replying.release()

    def reconfigure(self, **changes: Any) -> Plan:
        """Changes live settings of the loaded model, also while it answers. Raises a MoepicError."""
        if self.comparing:
            raise BadSettings("settings are being compared; stop that, or change them when it is done")
        engine = self._ready_engine()
        loaded = self._loaded
        assert loaded is not None, changes
        settings = loaded.settings.replace(**changes)
        applied = {**changes, "vram": self._vram(settings, engine.needs)} if "vram" in changes else changes
        plan = engine.reconfigure(**applied)
        with self._lock:
            if engine is self._engine and self._loaded is not None:
                self._loaded = dataclasses.replace(self._loaded, settings=settings)
            self._changes += 1
        return plan

    def reserve(self, nbytes: int) -> None:
        """Leaves `nbytes` of device memory to other programs, from the next token on. Raises a MoepicError."""
        before, loaded = self.kept.reserved_bytes, self._loaded
        self.kept.reserve(nbytes)
        try:
            if loaded is not None:
                self.reconfigure(vram=loaded.settings.vram)
        except BaseException:
            self.kept.reserve(before)
            raise
        self._changed()

    def _vram(self, settings: Settings, needs: Needs) -> str | int:
        """The budget that the engine gets: what the settings say, as far as other programs leave it."""
        if not self.kept.reserved_bytes:
            return settings.vram
        return fitted_budget(settings, needs, self.preview(settings).free_bytes, self.kept.reserved_bytes)

    def clear_notice(self) -> None:
        """What was wrong is not any more, or the user tries something else."""
        self._notice = None

    def close(self) -> None:
        """Stops what runs and unloads the model."""
        self._closed.set()
        self._load_cancelled.set()
        self.wait()
        self._unload()
        self._previews.close()

    def _ready_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise BadSettings("no model is loaded; choose a checkpoint and press Load")
        return engine

    def _load(self, settings: Settings, anyway: bool) -> None:
        try:
            self._replace(settings, anyway)
        except Cancelled:
            self.tell("error", f"{settings.checkpoint} was not loaded: cancelled")
        except Exception as error:  # the end of this thread: the page says what it is, the console has all of it
            self.tell("error", str(explained(error)))
        finally:
            with self._lock:
                self._progress = self._loader = None
                self._changes += 1  # some of it may be on this machine now

    def _replace(self, settings: Settings, anyway: bool) -> None:
        """Unloads the old model only when the new one looks good; brings it back if the new one fails nevertheless."""
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            folder = finder.resolve(settings.checkpoint, settings.revision, self._counter("downloading", settings))
        preview = self.preview(settings)
        assert preview.needs is not None, folder
        assert preview.verdict is not None, folder
        vram: str | int = int(preview.needs.smallest * LEAST_BUDGET)
        if preview.verdict.step != "will not run":
            budget = fitted_budget(settings, preview.needs, preview.free_bytes, preview.reserved_bytes)  # may refuse
            vram = budget if preview.reserved_bytes else settings.vram
        elif not anyway:
            raise OutOfRoom(f"{settings.checkpoint} {preview.verdict.text}")
        before = self._held()
        self._unload()
        try:
            self._bring(settings, str(folder), vram, self._load_cancelled)
        except BaseException:
            if before is not None:
                loaded = before.loaded
                self._bring(loaded.settings, loaded.spec.path, before.plan.memory.budget, self._closed)
            raise
        if Path(settings.checkpoint).is_dir():
            self.kept.remember(settings.checkpoint)

    def _unload(self) -> None:
        with self._lock:
            engine = self._engine
            self._engine = self._loaded = None
        if engine is not None:
            engine.close()

    def _bring(self, settings: Settings, folder: str, vram: str | int, cancelled: threading.Event) -> None:
        """Loads from `folder` with a budget of `vram`, which may be less than `settings` ask for."""
        from moepic_core.calibration import calibrate
        from moepic_core.engine import Engine

        local = settings.replace(checkpoint=folder, vram=vram)
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


def differing(settings: Settings) -> dict[str, Any]:
    """What of `settings` is not the default, without the checkpoint."""
    start = Settings(settings.checkpoint)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(start, name)}
