"""Loads models, in a thread of its own, and holds the one that answers now. Called by `state` alone.

A model is unloaded only when the next one looks good, and it comes back when that one fails nevertheless. What goes
wrong becomes a notice on the board and a line on the console, since nobody waits for it. Knows nothing of answers.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from moepic_core import finder
from moepic_core.errors import BadSettings, Cancelled, OutOfRoom
from moepic_core.folders import user_folder
from moepic_core.spec import Settings

from . import checkpoints
from .board import Board
from .faults import explained
from .nouns import Loaded, Progress
from .previews import Held, Previews, fitted_budget
from .settings_store import SettingsStore

if TYPE_CHECKING:  # importing the engine takes seconds, so the first load does that while the page is up already
    from moepic_core.engine import Engine

log = logging.getLogger("moepic")


class Present(NamedTuple):
    """The model that answers now, if any."""

    engine: Engine | None = None
    loaded: Loaded | None = None
    loads: int = 0  # models loaded so far


class Loader:
    def __init__(self, kept: SettingsStore, previews: Previews, board: Board) -> None:
        self.present = Present()  # replaced as a whole, so whoever reads it sees one instant
        self.progress: Progress | None = None
        self._kept = kept
        self._previews = previews
        self._board = board
        self._lock = threading.Lock()  # held for looks and assignments only, never while something works
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._closed = threading.Event()

    def start(self, settings: Settings, anyway: bool) -> None:
        """Starts to load and returns. Raises BadSettings while another model is being loaded.

        `anyway`: also when the verdict says that it will not run, with a budget as small as possible.
        """
        with self._lock:
            if self._thread is not None:
                raise BadSettings("a model is being loaded already; wait for it or cancel it")
            self._board.clear()
            self.progress = Progress("loading", settings.checkpoint)
            self._cancelled.clear()
            self._thread = threading.Thread(target=self._run, args=(settings, anyway), name="load", daemon=True)
            self._thread.start()

    def cancel(self) -> None:
        self._cancelled.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until no model is being loaded, or for so many seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def close(self) -> None:
        """Stops loading and unloads the model."""
        self._closed.set()
        self._cancelled.set()
        self.wait()
        self._unload()

    def held(self) -> Held | None:
        """The loaded model, and what would be free again without it."""
        engine, loaded, _ = self.present
        if engine is None or loaded is None:
            return None
        used = int(engine.snapshot().session.decode.activations[0].sum())
        in_host = 0 if engine.link.kind == "disk" else engine.spec.host_bytes
        num_tokens = used // max(1, engine.spec.top_k)
        return Held(loaded, engine.plan, engine.steering, num_tokens, engine.residency.arena.used_bytes, in_host)

    def settle(self, engine: Engine, settings: Settings) -> None:
        """From now on `engine` works under `settings`, unless another has taken its place."""
        with self._lock:
            if engine is self.present.engine and self.present.loaded is not None:
                loaded = dataclasses.replace(self.present.loaded, settings=settings)
                self.present = self.present._replace(loaded=loaded)

    def _run(self, settings: Settings, anyway: bool) -> None:
        try:
            self._replace(settings, anyway)
        except Cancelled:
            self._board.tell("error", f"{settings.checkpoint} was not loaded: cancelled")
        except Exception as error:  # the end of this thread: the page says what it is, the console has all of it
            sentence = f"{settings.checkpoint} was not loaded: {explained(error)}"
            self._board.tell("error", sentence)
            log.error("%s", sentence)
        finally:
            with self._lock:
                self.progress = self._thread = None
            self._board.changed()  # some of it may be on this machine now

    def _replace(self, settings: Settings, anyway: bool) -> None:
        """Unloads the old model only when the new one looks good; brings it back if the new one fails nevertheless."""
        folder = checkpoints.folder(settings.checkpoint)
        if folder is None:
            folder = finder.resolve(settings.checkpoint, settings.revision, self._counter("downloading", settings))
        before = self.held()
        vram = self._vram(settings, before, anyway)
        self._unload()
        try:
            self._bring(settings, str(folder), vram, self._cancelled)
        except BaseException:
            if before is not None:
                loaded = before.loaded
                self._bring(loaded.settings, loaded.spec.path, before.plan.memory.budget, self._closed)
            raise
        if Path(settings.checkpoint).is_dir():
            self._kept.remember(settings.checkpoint)

    def _vram(self, settings: Settings, before: Held | None, anyway: bool) -> str | int:
        """The budget to load with, which may be less than `settings` ask for. Raises OutOfRoom when it will not run."""
        preview = self._previews.of(settings, before, self._kept.reserved_bytes)
        assert preview.needs is not None, settings.checkpoint
        assert preview.verdict is not None, settings.checkpoint
        if preview.verdict.step != "will not run":
            budget = fitted_budget(settings, preview.needs, preview.free_bytes, preview.reserved_bytes)  # may refuse
            return budget if preview.reserved_bytes else settings.vram
        if not anyway:
            raise OutOfRoom(f"{settings.checkpoint} {preview.verdict.text}")
        return preview.needs.smallest

    def _unload(self) -> None:
        with self._lock:
            engine = self.present.engine
            self.present = Present(loads=self.present.loads)
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
                calibrate(engine, self._measuring(settings, cancelled))
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
            self.present = Present(engine, loaded, self.present.loads + 1)

    def _measuring(self, settings: Settings, cancelled: threading.Event) -> Callable[[float], None]:
        def tell(share: float) -> None:
            if cancelled.is_set():
                raise Cancelled("the measurement was cancelled")
            self.progress = Progress("measuring", settings.checkpoint, int(1000 * share), 1000)

        return tell

    def _counter(self, kind: Literal["downloading", "loading"], settings: Settings) -> Callable[[int, int], None]:
        def count(done_bytes: int, total_bytes: int) -> None:
            if kind == "downloading" and self._cancelled.is_set():
                raise Cancelled("the download was cancelled")
            self.progress = Progress(kind, settings.checkpoint, done_bytes, total_bytes)

        return count
