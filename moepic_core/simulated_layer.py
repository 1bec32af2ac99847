"""One layer of the simulated residency: which tops its slots hold, and what its segments weigh and cost.

`simulated_residency` owns one per layer. It stands for `device_cache` and the layer's part of `residency`: bytes are
those of `geometry`, seconds those of `LayerCosts`, victims the policy's. Also keeps the layer's counters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .costs import LayerCosts
from .eviction import EvictionPolicy
from .geometry import record_stride, segment, top_bytes
from .spec import LayerPlan, MoeLayer
from .trace import Outcome


class SimulatedLayer:
    """One layer's cache and counters, and what never changes of it."""

    def __init__(self, geometry: MoeLayer, share: LayerPlan, costs: LayerCosts, policy: EvictionPolicy) -> None:
        self.num_experts = geometry.num_experts
        self.costs = costs
        self.policy = policy
        self.rows, self.whole = share.top_rows, share.top_rows == geometry.neurons
        self.slots = share.slots if self.rows else 0
        self.cached: set[int] = set()
        self.top_bytes = top_bytes(geometry, self.rows)
        self.bottom_bytes = 0 if self.whole else segment(geometry, self.rows, geometry.neurons).nbytes
        # Behind a top in the same buffer, the alignment unit in which both meet has travelled already.
        self.rest_bytes = record_stride(geometry) - self.top_bytes
        self.top_s = costs.segment_s + self.rows * costs.row_s
        self.bottom_s = costs.segment_s + (geometry.neurons - self.rows) * costs.row_s
        self.admit_s = 0.0 if self.whole else self.top_bytes * costs.admit_s  # a whole one's buffer becomes its slot
        self.forget_counts()

    def forget_counts(self) -> None:
        self.outcomes = [0] * len(Outcome)  # uses of experts
        self.stall_s = 0.0

    @property
    def resident(self) -> bool:
        """Whether nothing of the layer ever travels."""
        return self.whole and len(self.cached) == self.num_experts

    def touch(self, experts: Sequence[int], now: int) -> None:
        """Token number `now` uses `experts`."""
        for expert in experts:
            self.policy.touch(expert, now)

    def warm_up(self, now: int) -> None:
        """Fills all slots with what the policy ranks highest."""
        self.cached.update(self.policy.ranking(now)[: self.slots])

    def make_room(self, expert: int, wanted: Collection[int], now: int) -> bool:
        """A slot for `expert`, after evicting if need be; False when all hold experts that this token uses."""
        if len(self.cached) == self.slots:
            candidates = self.cached.difference(wanted)
            if not candidates:
                return False
            self.cached.remove(self.policy.victim(candidates, now))
        self.cached.add(expert)
        return True

    def check(self) -> None:
        """Raise AssertionError if more is cached than there are slots, or what does not exist."""
        assert len(self.cached) <= self.slots, (len(self.cached), self.slots)
        assert all(0 <= expert < self.num_experts for expert in self.cached), (self.cached, self.num_experts)
