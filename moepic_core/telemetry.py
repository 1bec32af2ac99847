"""Exact and cheap counters, and the trace that they can be recomputed from: all that is measured while serving.

The compute thread reports steps, tokens and stalls, transfer threads report what they moved; page and command line read
`snapshot`, `events` and `trace` from any thread. One short lock makes every answer consistent.
Callers pass all times (seconds of one monotonic clock) and token numbers (counted over the session): no clock in here.
The trace keeps the newest rows and says how many older ones were lost; the counters lose nothing. What rows mean is
said in `trace`, what figures mean in `metrics`; this module is the door to both.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .metrics import METRICS, NUM_COUNTS, NUM_SECONDS, Counters, Phase, Reply, Scope, Snapshot
from .spec import Plan
from .trace import EVENT, Coverage, EventKind, Outcome, Part, Ring, Trace, TracePhase, routing_dtype

__all__ = ["METRICS", "EventKind", "Outcome", "Part", "Snapshot", "Telemetry", "Trace"]

_BYTES_COLUMN = {  # of Counters.counts
    EventKind.DEMAND: 3, EventKind.PREFETCH: 4, EventKind.USED: 5, EventKind.WASTED: 6,
}  # fmt: skip
_LINK_KINDS = frozenset({EventKind.DEMAND, EventKind.PREFETCH})
_STALL_S, _LINK_BUSY_S = range(NUM_SECONDS)  # columns of Counters.seconds


class Telemetry:
    """The one bookkeeper of a loaded model. Every method takes the lock once and waits for nothing else."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,  # of the layer that has most
        top_k: int,
        event_capacity: int = 1 << 16,
        routing_capacity: int = 5000 * 64,  # tokens × layers, 29 MB with 8 experts per token
    ) -> None:
        self._shape = num_layers, num_experts, top_k, event_capacity, routing_capacity
        self._num_layers, self._top_k = num_layers, top_k
        self._lock = threading.Lock()
        self._events = Ring(EVENT, event_capacity)
        self._routing = Ring(routing_dtype(top_k), routing_capacity)
        # [phase][layer][column or expert]: counting in lists costs half of counting in arrays
        self._counts = [[[0] * NUM_COUNTS for _ in range(num_layers)] for _ in TracePhase]
        self._seconds = [[[0.0] * NUM_SECONDS for _ in range(num_layers)] for _ in TracePhase]
        self._activations = [[[0] * num_experts for _ in range(num_layers)] for _ in TracePhase]
        self._version = 0
        self._phase: Phase = "loading"
        self._trace_phase = TracePhase.PREFILL  # outlives the reply: what comes late still belongs to it
        self._reply: Reply | None = None
        self._reply_number = 0
        self._last_token_s = 0.0
        self._link = Coverage()
        self._session_before = self._session()  # as it was when the current reply began
        self._plan: Plan | None = None
        self._memory_bytes: Mapping[str, int] = MappingProxyType({})

    def fresh(self) -> Telemetry:
        """An empty one for the same model."""
        return Telemetry(*self._shape)

    # What happens, in the order of a reply

    def set_phase(self, phase: Phase) -> None:
        """The engine is `loading` or `idle`; replies set the other phases themselves."""
        with self._lock:
            self._phase = phase
            self._version += 1

    def set_plan(self, plan: Plan, memory_bytes: Mapping[str, int]) -> None:
        """`plan` now holds, and device memory is divided like this (bytes by kind)."""
        with self._lock:
            self._plan, self._memory_bytes = plan, MappingProxyType(dict(memory_bytes))
            self._version += 1

    def begin_reply(self, now_s: float, prompt_tokens: int, cached_prompt_tokens: int) -> None:
        """A reply starts with its prefill; what was recorded so far belongs to the replies before."""
        with self._lock:
            self._reply_number += 1
            self._reply = Reply(self._reply_number, prompt_tokens, cached_prompt_tokens)
            self._phase, self._trace_phase = "prefill", TracePhase.PREFILL
            self._last_token_s = now_s
            self._session_before = self._session()
            self._version += 1

    def read_prompt(self, num_tokens: int) -> None:
        """`num_tokens` more tokens of the prompt have been run through the model."""
        with self._lock:
            reply = self._current_reply()
            self._reply = replace(reply, read_prompt_tokens=reply.read_prompt_tokens + num_tokens)
            self._version += 1

    def new_token(self, token: int, now_s: float) -> None:
        """A new token is out; `token` is the number of the one whose pass through the model made it."""
        with self._lock:
            reply = self._current_reply()
            seconds = now_s - self._last_token_s
            assert seconds >= 0, f"token {token} is out at {now_s} s, before the one at {self._last_token_s} s"
            head = (EventKind.TOKEN, self._trace_phase, 0, -1, -1, self._reply_number)
            self._events.put((*head, token, 0, self._last_token_s, now_s))
            if reply.decode_s is None:
                self._reply = replace(reply, new_tokens=1, ttft_s=seconds, decode_s=0.0)
            else:
                self._reply = replace(reply, new_tokens=reply.new_tokens + 1, decode_s=reply.decode_s + seconds)
            self._phase, self._trace_phase = "decode", TracePhase.DECODE
            self._last_token_s = now_s
            self._version += 1

    def end_reply(self) -> None:
        """The reply is complete, stopped or failed."""
        self.set_phase("idle")

    # What happens in every layer

    def layer_step(
        self,
        layer: int,
        token: int,
        experts: Sequence[int],
        outcomes: Sequence[int],
        counts: Sequence[int],
        guesses: Sequence[int] = (),
    ) -> None:
        """A pass ran `layer`: its distinct experts, what was resident of each, and how many tokens used each.

        `token` is the number of the pass's first token; a decode pass has one token and top_k experts. `guesses` are
        the experts that had been predicted for it, best first, at most top_k.
        """
        assert 0 <= layer < self._num_layers, f"layer {layer} of {self._num_layers}"
        assert len(experts) == len(outcomes) == len(counts), f"{experts} with {outcomes} and {counts}"
        room = self._top_k
        guessed = [*guesses, *[-1] * (room - len(guesses))]
        if padding := -len(experts) % room:
            experts, outcomes, counts = ([*column, *[0] * padding] for column in (experts, outcomes, counts))
        with self._lock:
            phase, put = self._trace_phase, self._routing.put
            head = (token, self._reply_number, layer, phase)
            slots = 0 if self._plan is None else self._plan.layers[layer].slots
            for i in range(0, len(experts), room):
                j = i + room
                put((*head, experts[i:j], outcomes[i:j], counts[i:j], guessed, slots))
            totals, activations = self._counts[phase][layer], self._activations[phase][layer]
            for expert, outcome, count in zip(experts, outcomes, counts, strict=True):
                totals[outcome] += count
                activations[expert] += count
            self._version += 1

    def event(
        self,
        kind: EventKind,
        layer: int,
        expert: int,
        part: int,
        start_s: float,
        end_s: float,
        nbytes: int,
        token: int,
    ) -> None:
        """Something happened for `token`. Any thread; `expert` -1 where there is none, `nbytes` 0 if nothing moved."""
        assert 0 <= layer < self._num_layers, f"layer {layer} of {self._num_layers}"
        assert end_s >= start_s, f"{kind!r} ends at {end_s} s, before it starts at {start_s} s"
        with self._lock:
            phase = self._trace_phase
            self._events.put((kind, phase, part, layer, expert, self._reply_number, token, nbytes, start_s, end_s))
            column = _BYTES_COLUMN.get(kind)
            if column is not None:
                self._counts[phase][layer][column] += nbytes
            if kind in _LINK_KINDS:
                self._seconds[phase][layer][_LINK_BUSY_S] += self._link.add(start_s, end_s)
            elif kind == EventKind.STALL:
                self._seconds[phase][layer][_STALL_S] += end_s - start_s
            self._version += 1

    def computed(self, layer: int, experts: Sequence[int], part: Part, bounds_s: Sequence[float], token: int) -> None:
        """COMPUTE events of segments one after the other: `experts[i]`'s from `bounds_s[i]` to `bounds_s[i + 1]`."""
        with self._lock:
            head, put = (EventKind.COMPUTE, self._trace_phase, part, layer), self._events.put
            for expert, bounds in zip(experts, pairwise(bounds_s), strict=True):
                put((*head, expert, self._reply_number, token, 0, *bounds))
            self._version += 1

    # What readers get

    @property
    def version(self) -> int:
        """Grows with every change: a reader that knows it need not ask for a snapshot."""
        return self._version

    def snapshot(self, residency: ArrayLike | None = None) -> Snapshot:
        """All figures at one instant, with `residency` [layers, experts] of Outcome as its owner sees it now."""
        resident = None if residency is None else np.array(residency, np.uint8)
        if resident is not None:
            resident.setflags(write=False)
        with self._lock:
            session, before = self._session(), self._session_before
            state = (self._version, self._phase, self._reply)
            told = (self._plan, self._memory_bytes)
        last_reply = Scope(session.prefill - before.prefill, session.decode - before.decode)
        return Snapshot(*state, last_reply, session, *told, resident)

    def events(self, since: int = 0) -> tuple[NDArray[np.void], int]:
        """Events from number `since` on, and how many of them are lost; next time ask since + lost + rows."""
        with self._lock:
            return self._events.since(since)

    def trace(self) -> Trace:
        """All that both rings hold."""
        with self._lock:
            (events, lost_events), (routing, lost_routing) = self._events.since(0), self._routing.since(0)
        return Trace(events, routing, lost_events, lost_routing)

    def check(self) -> None:
        """Raise AssertionError with both sides if the counters contradict each other."""
        with self._lock:
            session = self._session()
            self._link.check()
        for counters in (session.prefill, session.decode):
            uses, activations = counters.counts[:, :3].sum(axis=1), counters.activations.sum(axis=1)
            assert (uses == activations).all(), f"uses {uses.tolist()}, activations {activations.tolist()} per layer"

    def _current_reply(self) -> Reply:
        assert self._phase in ("prefill", "decode"), f"phase is {self._phase}, wanted prefill or decode"
        assert self._reply is not None, "no reply has begun"
        return self._reply

    def _session(self) -> Scope:
        return Scope(*(
            Counters(np.array(self._counts[phase]), np.array(self._seconds[phase]), np.array(self._activations[phase]))
            for phase in TracePhase
        ))  # fmt: skip
