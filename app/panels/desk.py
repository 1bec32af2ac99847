"""What the panels of model, budget and settings do together: whatever is changed in one of them shows in all.

Every handler ends with the values of all of them, made from a fresh preview of what is chosen. The state keeps what was
chosen for each checkpoint, and what the engine can change at once is changed at the next token.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from moepic_core.errors import BadSettings, MoepicError
from moepic_core.finder import CheckpointEntry
from moepic_core.spec import MachineProfile, Settings

from .. import cards, checkpoints, views
from ..nouns import Preview
from ..previews import badge
from ..settings_store import LIVE
from ..state import State
from . import budget, model, steer


@dataclass(frozen=True)
class Desk:
    state: State
    model: model.Model
    steer: steer.Steer
    budget: budget.Budget
    selection: gr.State  # Preview | None: what the picker points at
    turn: threading.Lock = field(default_factory=threading.Lock)  # of changes that come quickly

    @property
    def fields(self) -> list[gr.components.Component]:
        """Settings; `changes` names their values."""
        own = self.steer
        return [self.model.link, self.model.strategy, own.context, own.by_hand, own.split, own.eviction, own.prefetch]

    @property
    def outputs(self) -> list[Any]:
        """What `shown` and `problem` return values for."""
        own = self.steer
        return [self.selection, self.model.card, self.model.load, self.budget.slider, self.budget.bar,
                self.model.link, self.model.strategy, own.by_hand, own.split, own.eviction, own.prefetch,
                own.reserved, own.context, own.why]  # fmt: skip

    def shown(self, preview: Preview) -> list[Any]:
        link = gr.Dropdown(choices=model.link_choices(preview.machine.device, preview.settings.link),
                           value=preview.settings.link)  # fmt: skip
        fields = [link, preview.settings.strategy, *steer.shown(preview.settings, preview)]
        return [*self._cards(preview), *fields]

    def _cards(self, preview: Preview) -> list[Any]:
        card = self._card(cards.model_card(preview))
        return [preview, card, model.load_button(preview), *budget.shown(preview)]

    def problem(self, error: MoepicError, settings: Settings | None = None) -> list[Any]:
        """The card says what is wrong; the fields stay as they are, or show `settings`."""
        fields = [gr.skip()] * 9
        if settings is not None:
            fields = [gr.skip(), settings.strategy, *steer.shown(settings, None)]
        return [None, self._card(cards.problem_card(str(error))), model.load_button(None), *budget.shown(None), *fields]

    def _card(self, card: dict[str, Any]) -> str:
        look = self.state.look()
        return json.dumps({"loads": look.loads, "shown": views.shown(look), **card})

    def settings(self, checkpoint: str | None) -> Settings:
        """Those that hold for `checkpoint`, with what a load will change; or those that would hold."""
        if not checkpoint:
            raise BadSettings("no checkpoint is chosen; pick one, or type a folder or a hub id")
        kept, loaded = self.state.kept.of(checkpoint), self.state.look().loaded
        if loaded is not None and loaded.settings.checkpoint == checkpoint:
            return loaded.settings.replace(link=kept.link, context_length=kept.context_length)
        return kept

    def pick(self, checkpoint: str | None) -> list[Any]:
        """Another checkpoint, with what was chosen for it earlier. A folder of checkpoints joins the list instead."""
        self.state.clear_notice()
        settings = None
        try:
            if checkpoint and checkpoints.held_by(checkpoint):
                return self._offer(checkpoint)
            settings = self.settings(checkpoint)
            return [gr.skip(), *self.shown(self.state.preview(settings))]
        except MoepicError as error:
            return [gr.skip(), *self.problem(error, settings)]

    def _offer(self, folder: str) -> list[Any]:
        self.state.kept.remember(folder)
        num_found = len(checkpoints.held_by(folder))
        self.state.tell("info", f"{folder} holds {num_found} checkpoints; they are in the list now")
        return self.refresh()

    def change(self, checkpoint: str | None, *values: Any) -> list[Any]:
        """A field was changed. Fields stay as they are, since they may have been changed again meanwhile."""
        wanted = changes(*values)
        try:
            with self.turn:
                preview = self._apply(checkpoint, wanted)
        except MoepicError as error:
            return self.problem(error)
        _, split, *_, why = steer.shown(preview.settings, preview)
        if wanted["split"] is not None:
            split = gr.Slider(interactive=True)
        return [*self._cards(preview), *[gr.skip()] * 3, split, *[gr.skip()] * 4, why]

    def automatic(self, checkpoint: str | None) -> list[Any]:
        start = Settings("")
        try:
            return self.shown(self._apply(checkpoint, {name: getattr(start, name) for name in LIVE}))
        except MoepicError as error:
            return self.problem(error)

    def _apply(self, checkpoint: str | None, changes: dict[str, Any]) -> Preview:
        """What changes without a load does so at once; the rest is shown as it would be. Kept when it is possible."""
        self.state.clear_notice()
        settings, loaded = self.settings(checkpoint), self.state.look().loaded
        wanted = settings.replace(**changes)
        changed = {name: value for name, value in changes.items() if value != getattr(settings, name)}
        live = {name: value for name, value in changed.items() if name in LIVE}
        if live and loaded is not None and loaded.settings.checkpoint == checkpoint:
            self.state.reconfigure(**live)
        preview = self.state.preview(wanted)
        self._keep(wanted.checkpoint, changed)
        return preview

    def _keep(self, checkpoint: str, changed: dict[str, Any]) -> None:
        kept = self.state.kept
        kept.keep(checkpoint, **changed)
        if kept.problem is not None:
            self.state.tell("info", kept.problem)

    def slide(self, preview: Preview | None, value: float) -> str:
        """While the slider moves: what this budget would buy."""
        if preview is None or preview.budget_bytes is None:
            return "null"
        snapshot = self.state.look().snapshot
        # Asked anew because this can be answered after the slider was released and its budget is in force.
        in_use = snapshot.plan.memory.budget if preview.loaded and snapshot and snapshot.plan else None
        return json.dumps(cards.budget_card(preview, budget.wanted_bytes(preview, value), in_use))

    def release(self, preview: Preview | None, value: float) -> list[Any]:
        """When it is let go: the loaded model gets the budget at its next token, another one when it is loaded."""
        if preview is None or preview.budget_bytes is None:
            return [gr.skip()] * len(self.outputs)
        name = preview.settings.checkpoint
        try:
            return self.shown(self._apply(name, {"vram": budget.wanted_vram(preview, value)}))
        except MoepicError as error:
            self.state.tell("error", str(error))
            return self.shown(self.state.preview(preview.settings))

    def reserve(self, preview: Preview | None, gigabytes: float) -> list[Any]:
        if preview is None:
            return [gr.skip()] * len(self.outputs)
        try:
            self.state.clear_notice()
            self.state.reserve(round(gigabytes * cards.UNITS["GB"]))
        except MoepicError as error:
            self.state.tell("error", str(error))
        try:
            return self.shown(self.state.preview(preview.settings))
        except MoepicError as error:
            return self.problem(error)

    def load(self, preview: Preview | None, checkpoint: str | None, *values: Any) -> None:
        try:
            wanted = self.settings(checkpoint).replace(**changes(*values))
            if preview is not None and preview.settings.checkpoint == checkpoint:
                wanted = wanted.replace(vram=preview.settings.vram)
            self.state.load(wanted, anyway=preview is not None and preview.may_be_tried)
        except MoepicError as error:
            self.state.tell("error", str(error))

    def refresh(self) -> list[Any]:
        """What a new page shows, and every page after a load: the model that is loaded or on its way."""
        loaded = self.state.look().loaded
        current = loaded.settings if loaded is not None else self.state.settings
        try:
            preview = self.state.preview(current)
            return [self._picker(current, preview.machine), *self.shown(preview)]
        except MoepicError as error:
            return [gr.Dropdown(value=current.checkpoint), *self.problem(error, current)]

    def renew(self, preview: Preview | None) -> list[Any]:
        """The same model again, with what is known by now."""
        if preview is None:
            return [gr.skip()] * len(self.outputs)
        loaded = self.state.look().loaded
        settings = loaded.settings if preview.loaded and loaded is not None else preview.settings
        try:
            return self.shown(self.state.preview(settings))
        except MoepicError as error:
            return self.problem(error)

    def _picker(self, current: Settings, machine: MachineProfile) -> gr.Dropdown:
        def label(entry: CheckpointEntry) -> str:
            return cards.picker_label(entry, badge(entry.spec, machine, current.link) if entry.spec else None)

        found = checkpoints.entries(current.checkpoint, self.state.kept.folders)
        return gr.Dropdown(choices=[(label(entry), entry.name) for entry in found], value=current.checkpoint)


def changes(
    link: str,
    strategy: str,
    context: float | None,
    by_hand: bool,
    split: float,
    eviction: str,
    prefetch: str | int,
) -> dict[str, Any]:
    """Settings from the values of `Desk.fields`."""
    return {
        "link": link,
        "strategy": strategy,
        "context_length": int(context) if context else None,
        "split": split if by_hand else None,
        "eviction": eviction,
        "prefetch": prefetch,
    }


def wire(desk: Desk, page: gr.Blocks) -> None:
    own, chosen, bar = desk.steer, desk.model, desk.budget
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
    picked = [chosen.checkpoint, *desk.outputs]
    chosen.checkpoint.input(desk.pick, chosen.checkpoint, picked, **quiet)
    inputs = [chosen.link.input, chosen.strategy.input, own.eviction.input, own.prefetch.input, own.by_hand.input,
              own.split.release, own.context.submit, own.context.blur]  # fmt: skip
    each: dict[str, Any] = {"trigger_mode": "multiple", **quiet}  # none of quick changes may be lost
    gr.on(inputs, desk.change, [chosen.checkpoint, *desk.fields], desk.outputs, **each)
    own.automatic.click(desk.automatic, chosen.checkpoint, desk.outputs, **quiet)
    own.reserved.release(desk.reserve, [desk.selection, own.reserved], desk.outputs, **last)
    bar.slider.input(desk.slide, [desk.selection, bar.slider], bar.bar, **last)
    bar.slider.release(desk.release, [desk.selection, bar.slider], desk.outputs, **last)
    chosen.load.click(desk.load, [desk.selection, chosen.checkpoint, *desk.fields], None, **quiet)
    chosen.cancel.click(desk.state.cancel_load, None, None, **quiet)
    gr.on([page.load, chosen.refresh.click], desk.refresh, None, picked, **quiet)
    chosen.renew.click(desk.renew, desk.selection, desk.outputs, **quiet)
