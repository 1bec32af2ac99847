"""The one engine that all tabs of the page share: the only door to it.

Panels ask it to load, to answer and to change the budget, and read what `look` says; nothing they get can change. The
`loader` brings models, `answering` makes answers, `previews` say what a checkpoint would need; each works in threads of
its own, so no request of the page waits for a model. What goes wrong raises a MoepicError at once or becomes a `Notice`
later; conversation, settings and the model that answers now survive it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from moepic_core.budgets import OF_EXPERTS, Needs, budget_bytes
from moepic_core.calibrate import probe
from moepic_core.checkpoint import read_spec
from moepic_core.errors import BadSettings
from moepic_core.links import parse_link
from moepic_core.needs import needs_of
from moepic_core.spec import Plan, Settings
from moepic_core.telemetry import Telemetry
from moepic_core.units import parse_bytes

from . import checkpoints
from .answering import UPDATE_S, answers, prompt_of
from .board import Board
from .loader import Loader
from .nouns import Answer, Look, Preview
from .previews import Previews, fitted_budget
from .settings_store import SettingsStore

if TYPE_CHECKING:  # importing the engine takes seconds, so the first load does that while the page is up already
    from moepic_core.ablation import Row
    from moepic_core.engine import Engine
    from moepic_core.hf.text import Message
    from moepic_core.steering import Steering


class State:
    """See the module. `settings` are those of the start; `kept` has those of every checkpoint, from then on."""

    def __init__(self, settings: Settings, kept: SettingsStore | None = None) -> None:
        self.settings = settings
        self.kept = kept or SettingsStore(given=differing(settings))
        self.comparing = False  # settings; then none can change
        self._board = Board()
        self._replying = threading.Lock()  # held by the one reply that is being made
        self._previews = Previews(self._board.changed)
        self._loader = Loader(self.kept, self._previews, self._board)

    def look(self) -> Look:
        """All that is true now. Cheap; from any thread."""
        engine, loaded, loads = self._loader.present
        snapshot = engine.snapshot() if engine else None
        return Look(loads, self._loader.progress, self._board.notice, loaded, snapshot, self._board.changes)

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
        self._board.tell(kind, text)

    def clear_notice(self) -> None:
        """What was wrong is not any more, or the user tries something else."""
        self._board.clear()

    def check(self, settings: Settings) -> None:
        """Raises a MoepicError for what cannot work, as far as a glance shows it: names, units, headers."""
        machine = probe(settings.device)
        parse_link(settings.link, machine.device)
        in_words = str(settings.vram).endswith(("auto", "%", OF_EXPERTS))
        budget = None if in_words else parse_bytes(settings.vram)
        folder = checkpoints.folder(settings.checkpoint)
        if folder is not None:
            spec = read_spec(folder, settings.dtype)
            if budget is not None and budget < spec.resident_bytes:  # hopeless, whatever loading would find
                budget_bytes(budget, needs_of(settings, spec, machine), machine.device_free_bytes)

    def preview(self, settings: Settings) -> Preview:
        """What `settings` would need here; loads nothing. Raises a MoepicError when they cannot work at all."""
        return self._previews.of(settings, self._loader.held(), self.kept.reserved_bytes)

    def load(self, settings: Settings, anyway: bool = False) -> None:
        """Starts to load and returns. When that fails, the model from before answers again and a notice says why.

        `anyway`: also when the verdict says that it will not run, with a budget as small as possible.
        """
        self._loader.start(settings, anyway)

    def cancel_load(self) -> None:
        self._loader.cancel()

    def wait(self) -> None:
        """Until no model is being loaded."""
        self._loader.wait()

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

        One reply at a time: others wait for their turn, and all of them for a model that is being loaded. Now and then
        the text comes without being longer: closing the iterator between two texts stops the engine too, also while a
        long prompt is read. `sampling` are further fields of the engine's `Sampling`. Raises a MoepicError.
        """
        while (waits := self._waits_for()) or not self._replying.acquire(timeout=UPDATE_S):
            if stopped():
                yield Answer(reason="stopped")
                return
            if waits:
                self._loader.wait(UPDATE_S)
            yield Answer(waits=waits or "another answer to be complete")
        try:
            values = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, **sampling}
            yield from answers(self._ready_engine(), messages, values, stopped, self._board)
        finally:
            self._replying.release()
            self._board.changed()  # forecasts say how far replies were from them

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
            return compare(engine, prompt_of(engine, messages), tell)
        finally:
            self.comparing = False
            self._replying.release()

    def reconfigure(self, **changes: Any) -> Plan:
        """Changes live settings of the loaded model, also while it answers. Raises a MoepicError."""
        if self.comparing:
            raise BadSettings("settings are being compared; stop that, or change them when it is done")
        engine, loaded = self._ready_engine(), self._loader.present.loaded
        assert loaded is not None, changes
        settings = loaded.settings.replace(**changes)
        applied = {**changes, "vram": self._vram(settings, engine.needs)} if "vram" in changes else changes
        plan = engine.reconfigure(**applied)
        self._loader.settle(engine, settings)
        self._board.changed()
        return plan

    def reserve(self, nbytes: int) -> None:
        """Leaves `nbytes` of device memory to other programs, from the next token on. Raises a MoepicError."""
        before, loaded = self.kept.reserved_bytes, self._loader.present.loaded
        self.kept.reserve(nbytes)
        try:
            if loaded is not None:
                self.reconfigure(vram=loaded.settings.vram)
        except BaseException:
            self.kept.reserve(before)
            raise
        self._board.changed()

    def close(self) -> None:
        """Stops what runs and unloads the model."""
        self._loader.close()
        self._previews.close()

    @property
    def _engine(self) -> Engine | None:
        return self._loader.present.engine

    def _waits_for(self) -> str:
        """What a reply has to wait for before there is any model: its loading, for people; "" for nothing.

        Raises BadSettings when none is loaded nor will be.
        """
        progress = self._loader.progress
        if self._engine is None and progress is not None:
            done = f", {progress.done_bytes / progress.total_bytes:.0%} done" if progress.total_bytes else ""
            return f"the model ({progress.kind}{done})"
        self._ready_engine()
        return ""

    def _ready_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise BadSettings("no model is loaded; choose a checkpoint and press Load")
        return engine

    def _vram(self, settings: Settings, needs: Needs) -> str | int:
        """The budget that the engine gets: what the settings say, as far as other programs leave it."""
        if not self.kept.reserved_bytes:
            return settings.vram
        return fitted_budget(settings, needs, self.preview(settings).free_bytes, self.kept.reserved_bytes)


def differing(settings: Settings) -> dict[str, Any]:
    """What of `settings` is not the default, without the checkpoint."""
    start = Settings(settings.checkpoint)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(start, name)}
