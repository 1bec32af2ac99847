"""What readers see: the frozen figures inside a `Snapshot`, and `METRICS`, the one table of their definitions.

`telemetry` fills these in; the page, the command line and benchmarks read them and nothing else.
All figures are exact, all arrays are read-only, and `None` means unknown, never zero.
`METRICS` also says how each figure follows from the exported trace; a test evaluates every formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .spec import Plan

Phase = Literal["loading", "idle", "prefill", "decode"]
NUM_COUNTS, NUM_SECONDS = 7, 2  # fields of Figures: integers first, then times


@dataclass(frozen=True, slots=True)
class Figures:
    """The counters of one layer, or of all layers together, in one phase or both, of one reply or the session."""

    misses: int
    partial_hits: int
    hits: int
    demand_bytes: int
    prefetch_bytes: int
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    stall_s: float
    link_busy_s: float

    @property
    def uses(self) -> int:
        return self.misses + self.partial_hits + self.hits

    @property
    def hit_rate(self) -> float | None:
        return _share(self.hits, self.uses)

    @property
    def partial_hit_rate(self) -> float | None:
        return _share(self.partial_hits, self.uses)

    @property
    def miss_rate(self) -> float | None:
        return _share(self.misses, self.uses)

    @property
    def prefetch_accuracy(self) -> float | None:
        return _share(self.prefetch_used_bytes, self.prefetch_used_bytes + self.prefetch_wasted_bytes)

    @property
    def overlap(self) -> float | None:
        stalled = _share(self.stall_s, self.link_busy_s)
        return None if stalled is None else max(0.0, 1.0 - stalled)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True, eq=False)
class Counters:
    """The counters of every layer, as read-only arrays."""

    counts: NDArray[np.int64]  # [layers, NUM_COUNTS], columns in the order of Figures
    seconds: NDArray[np.float64]  # [layers, NUM_SECONDS], likewise
    activations: NDArray[np.int64]  # [layers, experts]

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.setflags(write=False)

    def _arrays(self) -> list[NDArray[Any]]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(mine + theirs for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(mine - theirs for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)))

    @property
    def total(self) -> Figures:
        """All layers together."""
        return Figures(*self.counts.sum(axis=0).tolist(), *self.seconds.sum(axis=0).tolist())

    @property
    def layers(self) -> tuple[Figures, ...]:
        """One row per layer."""
        rows = zip(self.counts.tolist(), self.seconds.tolist(), strict=True)
        return tuple(Figures(*counts, *seconds) for counts, seconds in rows)


@dataclass(frozen=True, eq=False)
class Scope:
    """One reply or the whole session. The hit rate of a chat is that of `decode`."""

    prefill: Counters
    decode: Counters

    @property
    def both(self) -> Counters:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Reply:
    """The current reply, or the last one when the phase is idle."""

    number: int  # 1 for the first of the session
    prompt_tokens: int
    cached_prompt_tokens: int
    read_prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float | None = None
    decode_s: float | None = None

    @property
    def prefill_progress(self) -> float | None:
        return _share(self.read_prompt_tokens, self.prompt_tokens - self.cached_prompt_tokens)

    @property
    def tpot_s(self) -> float | None:
        return None if self.decode_s is None else _share(self.decode_s, self.new_tokens - 1)

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.decode_s is None else _share(self.new_tokens - 1, self.decode_s)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that is shown, at one instant."""

    version: int  # grows with every change
    phase: Phase
    reply: Reply | None  # None before the first
    last_reply: Scope
    session: Scope
    plan: Plan | None
    memory_bytes: Mapping[str, int]
    residency: NDArray[np.uint8] | None  # [layers, experts]


class Metric(NamedTuple):
    """One figure: where readers find it, its unit, what it means, and its formula over the trace ('' if it is told)."""

    name: str
    unit: str
    definition: str
    formula: str = ""


# The formulas see the trace's rows of the reply, phase and layer in question: `routing`, its `outcomes` and `counts`;
# of the events `kind`, `nbytes`, `end_s`, `seconds` (end_s − start_s) and `credit` (the part of a transfer that no
# transfer recorded before it covers). They also see the names of kinds and outcomes, num_layers, num_experts and the
# figures above them. A formula that divides by zero or finds no row means None.
METRICS: tuple[Metric, ...] = (
    Metric("uses", "count", "Expert uses, one per (token, layer, expert).", "np.sum(counts)"),
    Metric("hits", "count", "Uses of an expert that was wholly resident.", "np.sum(counts[outcomes == HIT])"),
    Metric("partial_hits", "count", "Uses of an expert of which only the top segment was resident.",
           "np.sum(counts[outcomes == PARTIAL])"),
    Metric("misses", "count", "Uses of an expert of which nothing was resident.",
           "np.sum(counts[outcomes == MISS])"),
    Metric("hit_rate", "0..1", "Share of uses that were hits.", "hits / uses"),
    Metric("partial_hit_rate", "0..1", "Share of uses that were partial hits.", "partial_hits / uses"),
    Metric("miss_rate", "0..1", "Share of uses that were misses.", "misses / uses"),
    Metric("activations", "count", "Uses of each expert of each layer.",
           "np.bincount((routing['layer'][:, None] * np.int64(num_experts) + routing['experts']).ravel(),"
           " counts.ravel(), num_layers * num_experts).reshape(num_layers, num_experts)"),
    Metric("demand_bytes", "bytes", "Brought to the device because it was needed now.",
           "np.sum(nbytes[kind == DEMAND])"),
    Metric("prefetch_bytes", "bytes", "Brought to the device because it was guessed.",
           "np.sum(nbytes[kind == PREFETCH])"),
    Metric("prefetch_used_bytes", "bytes", "Prefetched and then used.", "np.sum(nbytes[kind == USED])"),
    Metric("prefetch_wasted_bytes", "bytes", "Prefetched and then forgotten without a use.",
           "np.sum(nbytes[kind == WASTED])"),
    Metric("prefetch_accuracy", "0..1", "Share of prefetched bytes that were used, of those whose fate is known.",
           "prefetch_used_bytes / (prefetch_used_bytes + prefetch_wasted_bytes)"),
    Metric("stall_s", "s", "Time for which compute had nothing to do but wait for the link.",
           "np.sum(seconds[kind == STALL])"),
    Metric("link_busy_s", "s", "Time in which at least one transfer was under way, demand load or prefetch. Where "
           "several are, the one recorded first has the credit, so that layers, phases and replies add up.",
           "np.sum(credit)"),
    Metric("overlap", "0..1", "1 − stall / link busy time: the share of transfer time that compute did not wait for.",
           "max(0, 1 - stall_s / link_busy_s)"),
    Metric("prompt_tokens", "tokens", "Length of the prompt, the earlier conversation included."),
    Metric("cached_prompt_tokens", "tokens", "Prompt tokens whose KV was kept from the turn before."),
    Metric("read_prompt_tokens", "tokens", "Prompt tokens that were not cached and have been run through the model."),
    Metric("prefill_progress", "0..1", "Share of the uncached prompt that has been read."),
    Metric("new_tokens", "tokens", "Tokens generated.", "np.sum(kind == TOKEN)"),
    Metric("ttft_s", "s", "Time to first token: from the start of the reply until its first token is out.",
           "seconds[kind == TOKEN][0]"),
    Metric("decode_s", "s", "From the first token until the last one so far.",
           "np.ptp(end_s[kind == TOKEN])"),
    Metric("tpot_s", "s", "Time per output token: mean over the tokens after the first.",
           "decode_s / (new_tokens - 1)"),
    Metric("tokens_per_s", "tokens/s", "Decode speed, 1 / TPOT.", "(new_tokens - 1) / decode_s"),
    Metric("phase", "word", "What the engine is doing: loading, idle, prefill or decode."),
    Metric("memory_bytes", "bytes", "Device memory by kind: resident weights, KV, workspace, staging, expert cache."),
    Metric("slots", "count", "Top segments that a layer may keep in its cache."),
    Metric("split_ratio", "0..1", "Top / whole of a layer's experts: 0 is prefetch only, 1 a whole-expert cache."),
    Metric("residency", "code", "What of each expert is on the device: 0 nothing, 1 its top segment, 2 all of it."),
)  # fmt: skip
