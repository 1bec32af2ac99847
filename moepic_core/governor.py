"""Keeps the device under the plan: puts plans in force, settles for less where the machine refuses, shrinks in need.

The engine, its replies and its measurements ask it; `steering` makes the plans and `residency` carries them out. Holds
the settings that are in force and what the user should know of them. Takes no turn: whoever calls `apply`, `renew` or
`shrink` has it.
"""

from __future__ import annotations

from .assembly import Parts
from .budgets import budget_bytes
from .errors import OutOfRoom
from .needs import free_for_budget
from .spec import Plan, Settings
from .units import format_bytes


class Governor:
    def __init__(self, parts: Parts) -> None:
        self.settings = parts.settings
        self.notices = list(parts.notices)
        self._needs = parts.needs
        self._steering = parts.steering
        self._residency = parts.residency
        self._free_bytes = free_for_budget(parts.machine, parts.link, parts.spec)

    @property
    def plan(self) -> Plan:
        """What is in force."""
        assert self._residency.plan is not None
        return self._residency.plan

    def plan_for(self, settings: Settings) -> Plan:
        """The plan of `settings` by all that is known now, without applying it. Raises BadSettings or OutOfRoom."""
        return self._steering.plan(settings, budget_bytes(settings.vram, self._needs, self._free_bytes))

    def apply(self, plan: Plan) -> None:
        """Puts `plan` in force; when the machine refuses memory that the budget has, settles for less and says so."""
        old = self._residency.plan
        try:
            self._residency.apply(plan)
        except OutOfRoom as error:
            held = int(self._residency.arena.used_bytes * 0.95)
            if held < self._needs.smallest:
                raise
            self._residency.apply(self._steering.plan(self.settings, held))
            self.notices.append(f"the budget is {format_bytes(held)} for now: {error}")
        trace = self._steering.trace() if old is None or old.eviction != plan.eviction else None
        if trace is not None:  # a new eviction policy begins with what is known, not from nothing
            self._residency.remember(trace)
        self.tell()

    def renew(self) -> None:
        """Plans the settings in force anew, by what is known now."""
        self.apply(self.plan_for(self.settings))

    def shrink(self) -> str:
        """Gives a tenth of the budget back, as far as the cache has it, and says so."""
        old = self.plan.memory
        budget = max(self._needs.smallest, int(old.budget * 0.9))
        self._residency.apply(self._steering.plan(self.settings, budget))
        self.tell()
        return (
            f"memory ran out, so the budget went from {format_bytes(old.budget)} to {format_bytes(budget)} and the "
            f"reply went on; set vram to {format_bytes(budget)} or lower to avoid this"
        )

    def tell(self) -> None:
        """Tells telemetry which plan is in force."""
        self._residency.telemetry.set_plan(self.plan, self._residency.arena.bytes_by_kind)
