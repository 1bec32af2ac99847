"""What a decode step costs on one machine: `Costs`, measured by `calibrate` or estimated from a preset.

Cost model, planner and simulator read these and nothing else of the machine. `Breakdown` is their answer: where the
seconds of one token go. All are frozen; all times are seconds, all rates bytes per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerCosts:
    """One MoE layer in one decode step."""

    before_s: float  # from the end of the previous layer's experts to this router's answer: attention, norms
    step_s: float  # what a layer's experts cost however few segments there are: bookkeeping, the final sum
    guess_s: float  # asking the next layer's router ahead of time
    segment_s: float  # of computing one segment, however short it is
    row_s: float  # more for each neuron of a segment
    admit_s: float  # of copying one arrived top into its slot, per byte; a whole expert's buffer becomes its slot
    transfer_s: float  # of handing one transfer over, and what serving it takes from whoever computes
    drag: float = 0.0  # seconds that computing loses for each second of the link beside it: both use one memory


@dataclass(frozen=True)
class LinkSpeed:
    """The link with nothing else to do, and the memories at its ends."""

    bytes_per_s: float  # of many transfers at once
    latency_s: float  # of one transfer, on top of its bytes
    copy_s_per_byte: float  # of a copy within the device
    host_bytes_per_s: float  # of a copy within host memory


@dataclass(frozen=True)
class Costs:
    """A model on a machine."""

    layers: tuple[LayerCosts, ...]
    after_s: float  # from the last layer's experts to the next token's first layer: norm, head, sampling, embedding
    link_bytes_per_s: float  # while the device computes
    link_latency_s: float  # of one transfer, on top of its bytes
    chunk_bytes: int  # a transfer runs in chunks of this size; a demand waits for the chunk under way
    source: Literal["measured", "estimated"]
    error: float = 0.0  # median of |computing predicted / measured − 1| over the tokens that they were fitted to
    note: str = ""  # for people: what has changed since they were measured
    guess_accuracy: tuple[tuple[float, ...], ...] = ()  # [layers][ranks], share of right guesses; () for not measured
    alone: LinkSpeed | None = None  # for people; None: not measured


@dataclass(frozen=True)
class Breakdown:
    """Expected seconds of one token, itemised. The parts sum up to `total_s`."""

    before_s: float  # attention, norms, routers, dense layers
    experts_s: float  # computing with segments, bookkeeping and admission included
    stall_s: float  # compute had nothing to do but wait for the link
    after_s: float  # head and sampling
    link_s: float  # for which the link is busy; overlaps the others and is no part of the sum
    hit_rate: float
    partial_hit_rate: float
    miss_rate: float
    link_bytes: float  # that travel for one token
    wasted_s: float  # of `link_s`, spent on wrong guesses

    @property
    def covered_s(self) -> float:
        """Of `link_s`, hidden behind computing."""
        return max(0.0, self.link_s - self.stall_s)

    @property
    def total_s(self) -> float:
        return self.before_s + self.experts_s + self.stall_s + self.after_s

    @property
    def overlap(self) -> float:
        """1 − stall / link busy time; 1 when nothing travels."""
        return max(0.0, 1.0 - self.stall_s / self.link_s) if self.link_s else 1.0
