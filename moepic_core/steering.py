"""What planning knows and when it plans: measured costs, and the routing of this and earlier sessions.

The engine asks it for every plan. Statistics come from the telemetry's recorded rows, so nothing is counted twice.
Plans are made outside the engine's turn, since planning a large model takes part of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .budgets import Needs
from .costs import Breakdown, Costs
from .drift import KEPT, Drift, drift_of, followed, is_stale
from .memory import Memory
from .planner import make_plan, what_if
from .routing import RoutingTrace, joined
from .spec import MachineProfile, ModelSpec, Plan, Settings
from .telemetry import Telemetry
from .trace import decoded

WINDOW = 5000  # tokens that statistics cover, and after which a new plan is due (arXiv 2509.08342)
_ENOUGH = 32  # tokens below which statistics say too little to plan from
_FIRST = 128  # tokens until the first plan that stands on statistics


def costs_key(spec: ModelSpec, machine: MachineProfile, link_label: str) -> list[object]:
    """All that measured costs depend on."""
    threads = torch.get_num_threads()  # that compute
    return [spec.fingerprint, spec.dtype, link_label, machine.device_name, machine.cpu_cores, threads]


class Steering:
    def __init__(
        self,
        spec: ModelSpec,
        machine: MachineProfile,
        link_label: str,
        needs: Needs,
        telemetry: Telemetry,
        memory: Memory,
        brought: RoutingTrace | None = None,
    ) -> None:
        """`brought` is routing that came with the checkpoint; what was recorded here takes its place."""
        self.spec = spec
        self._machine = machine
        self.needs = needs
        self.telemetry = telemetry
        self.memory = memory
        self._key = costs_key(spec, machine, link_label)
        self.costs = memory.costs(self._key)
        self.earlier = memory.trace(spec.fingerprint) or brought
        self._new_tokens = 0  # made since the last plan
        self._known_tokens = 0  # that it stands on
        self.drifts: tuple[Drift, ...] = ()  # of the last replies, from the costs in force
        self._costs_changed = False  # since the last plan

    @property
    def machine(self) -> MachineProfile:
        """As it was when loading began, with what calibration measured of its link and its memory."""
        if self.costs is None or self.costs.alone is None:
            return self._machine
        alone = self.costs.alone
        return replace(
            self._machine,
            link_bytes_per_s=alone.bytes_per_s,
            link_contended_bytes_per_s=self.costs.link_bytes_per_s,
            host_memory_bytes_per_s=alone.host_bytes_per_s,
        )

    def learn(self, costs: Costs) -> None:
        """From now on plans stand on `costs`."""
        self.costs = costs
        self.drifts = ()
        self._costs_changed = True
        self.memory.keep_costs(self._key, costs)

    def follow(self, plan: Plan) -> None:
        """Compares the last reply with what `plan`, which held for all of it, predicted. When replies are too far off,
        costs follow them, and a new plan is due.
        """
        reply = self.telemetry.snapshot().reply
        if self.costs is None or reply is None:
            return
        found = drift_of(self.telemetry.events()[0], reply.number, plan, self.spec.moe_layers, self.costs)
        if found is None:
            return
        self.drifts = (*self.drifts, found)[-KEPT:]
        if is_stale(self.drifts):
            costs = followed(self.costs, self.drifts)
            if costs is not self.costs:
                self.learn(costs)

    def trace(self) -> RoutingTrace | None:
        """The last WINDOW tokens, of earlier sessions too; None while they are too few."""
        known = self._session()
        if self.earlier is not None:
            known = joined(self.earlier, known)
        return known.last(WINDOW) if known.num_tokens >= _ENOUGH else None

    def plan(self, settings: Settings, budget: int) -> Plan:
        """The plan of `settings` under `budget` bytes, by all that is known now."""
        trace = self.trace()
        self._new_tokens, self._known_tokens = 0, 0 if trace is None else trace.num_tokens
        self._costs_changed = False
        return make_plan(settings, self.needs, budget, self.costs, trace)

    def forecast(self, settings: Settings, budgets: Sequence[int]) -> list[tuple[int, Breakdown]]:
        """What `settings` would cost under each of `budgets`; empty while nothing is measured."""
        return [] if self.costs is None else what_if(settings, self.needs, self.costs, self.trace(), budgets)

    def count_token(self) -> None:
        self._new_tokens += 1

    @property
    def due(self) -> bool:
        """Whether what is known has doubled or costs have changed since the last plan (ours), or after WINDOW tokens
        (the paper).
        """
        return self._costs_changed or self._new_tokens >= min(WINDOW, max(_FIRST, self._known_tokens))

    def keep(self) -> None:
        """Saves the routing for the next start."""
        trace = self.trace()
        if trace is not None:
            self.memory.keep_trace(self.spec.fingerprint, trace)

    def _session(self) -> RoutingTrace:
        num_experts = [layer.num_experts for layer in self.spec.moe_layers]
        return decoded(self.telemetry.trace(), num_experts, f"recorded from {self.spec.name}", {})
