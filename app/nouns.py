"""What the rooms of the page exchange: `state` makes these, panels pass them on, `views` turns them into words.

All are frozen. The core's own nouns (settings, specs, plans, snapshots) travel inside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moepic_core.budgets import HEADROOM, Needs
from moepic_core.costs import Breakdown
from moepic_core.drift import TYPICAL_ERROR
from moepic_core.events import FinishReason
from moepic_core.links import Link
from moepic_core.metrics import Reply, Snapshot
from moepic_core.spec import MachineProfile, ModelSpec, Plan, Settings
from moepic_core.uniform import uniform_plan
from moepic_core.verdict import Verdict


@dataclass(frozen=True)
class Progress:
    """A model on its way."""

    kind: Literal["downloading", "loading", "measuring"]
    name: str
    done_bytes: int = 0
    total_bytes: int = 0  # 0: unknown


@dataclass(frozen=True)
class Notice:
    """Something that the user should read. A new one takes the place of the one before."""

    number: int
    kind: Literal["error", "info"]
    text: str


@dataclass(frozen=True)
class Answer:
    """What a reply has brought so far."""

    text: str = ""
    waits: str = ""  # what for, in words, as long as nobody works on it
    read_tokens: int = 0  # of the part of the prompt that is new
    prompt_tokens: int = 0  # of that part; 0 until some of it is read
    reason: FinishReason | None = None  # why it ended; None while it goes on
    figures: Reply | None = None  # once it has ended


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

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this model for as long as it is loaded."""
        if self.has_chat_template:
            return self.notices
        return (*self.notices, "this checkpoint has no chat template, so it continues your text instead of answering")


@dataclass(frozen=True)
class Look:
    """All that is true at one instant. There is a snapshot when a model is loaded."""

    loads: int  # grows with every model that has been loaded: a page that sees it change asks again for what it shows
    progress: Progress | None
    notice: Notice | None
    loaded: Loaded | None
    snapshot: Snapshot | None
    changes: int = 0  # grows when what a preview says may have changed


@dataclass(frozen=True)
class Forecast:
    """What a token would cost under some budgets, rising from the smallest."""

    points: tuple[tuple[int, Breakdown], ...]  # bytes, and where the seconds go
    error: float = TYPICAL_ERROR  # how far the speed may be from it, 0..1
    origin: str = ""  # of the routing that it stands on, in words

    @property
    def budgets(self) -> list[int]:
        return [budget for budget, _ in self.points]

    def at(self, budget: int, figure: str) -> float:
        """The `figure` of a Breakdown under `budget`, between the budgets that were planned."""
        return float(np.interp(budget, self.budgets, [getattr(cost, figure) for _, cost in self.points]))


@dataclass(frozen=True)
class Preview:
    """What a checkpoint would need on this machine: from its headers, or as measured when it is loaded."""

    settings: Settings
    machine: MachineProfile  # with what the loaded model would give back counted as free
    link: Link
    spec: ModelSpec | None = None  # None: the checkpoint is not wholly on this machine yet
    needs: Needs | None = None
    verdict: Verdict | None = None
    budget_bytes: int | None = None  # None: no budget works
    loaded: bool = False
    reloads: bool = False  # the same checkpoint is loaded, with settings that only a load can change
    notes: tuple[str, ...] = ()
    forecast: Forecast | None = None  # None: nothing is measured yet, or it is being made
    reserved_bytes: int = 0  # device memory that other programs shall have
    in_force: Plan | None = None  # of the loaded model
    missing: str | None = None  # of a checkpoint that was begun to be downloaded, in words

    @property
    def free_bytes(self) -> int:
        """Device memory that a budget may take. Without a GPU, an emulated link's host copy lies in the same memory."""
        copy = self.spec.host_bytes if self.spec is not None and self.link.kind == "emulated" else 0
        return max(0, int((self.machine.device_free_bytes - self.reserved_bytes) * HEADROOM) - copy)

    @property
    def may_be_tried(self) -> bool:
        """Whether loading can work although the verdict says no: what is short may be given back until then."""
        if self.spec is None or self.verdict is None or self.verdict.step != "will not run":
            return False
        return self.link.kind == "disk" or self.spec.host_bytes <= self.machine.host_free_bytes

    def plan(self, budget: int) -> Plan:
        """What `budget` would buy: the plan in force where it is that, else equal shares."""
        assert self.needs is not None, self.settings.checkpoint
        if self.in_force is not None and self.in_force.memory.budget == budget:
            return self.in_force
        return uniform_plan(self.settings, self.needs, budget)
