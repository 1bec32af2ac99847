"""What the rooms of the page exchange. All frozen: `state` makes them, `views` turns them into words, panels pass them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moepic_core.calibrate import HEADROOM
from moepic_core.links import Link
from moepic_core.metrics import Snapshot
from moepic_core.planner import Needs, uniform_plan
from moepic_core.spec import MachineProfile, ModelSpec, Plan, Settings
from moepic_core.verdict import Verdict


@dataclass(frozen=True)
class Progress:
    """A model on its way."""

    kind: Literal["downloading", "loading"]
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
    """All that is true at one instant. There is a snapshot when a model is loaded."""

    loads: int  # grows when a load ends, well or not: a page that sees it change asks again for what it shows
    progress: Progress | None
    notice: Notice | None
    loaded: Loaded | None
    snapshot: Snapshot | None


@dataclass(frozen=True)
class Preview:
    """What a checkpoint would need on this machine: from its headers, or as measured when it is loaded."""

    settings: Settings
    machine: MachineProfile  # with what the loaded model would give back counted as free
    link: Link
    spec: ModelSpec | None = None  # None: the checkpoint is not on this machine yet
    needs: Needs | None = None
    verdict: Verdict | None = None
    budget_bytes: int | None = None  # None: no budget works
    loaded: bool = False
    notes: tuple[str, ...] = ()

    @property
    def free_bytes(self) -> int:
        """Device memory that a budget may take."""
        return int(self.machine.device_free_bytes * HEADROOM)

    def plan(self, budget: int) -> Plan:
        """What `budget` would buy."""
        assert self.needs is not None, self.settings.checkpoint
        return uniform_plan(self.settings, self.needs, budget)
