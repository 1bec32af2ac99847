"""The residency without tensors: caches, staging, guesses and the link of a simulated machine, between two steps.

`simulator` makes one for a replay, `simulated_step` runs a layer on it. It takes the same decisions as `residency` in
the same order and asks the same policies and predictors; the methods bear the names of what they mirror, and a test
compares both use by use. Where the engine waits, the simulated clock moves on. Keeps counters and, when asked, rows of
EVENT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from .activation_matrices import ActivationMatrices
from .costs import Costs
from .eviction import make_policy
from .predictor import Predictor
from .routing import RoutingTrace
from .simulated_layer import SimulatedLayer
from .simulated_link import SimulatedLink, Ticket
from .spec import MoeLayer, Plan
from .trace import EventKind, Part, TracePhase

Submit = Callable[[int, int, Part, int, float], Ticket]  # layer, expert, part, bytes, now


class Staged:
    """A staging buffer in use: what was sent into it."""

    __slots__ = ("bottom", "tickets", "top")

    def __init__(self, top: Ticket | None, bottom: Ticket | None) -> None:
        self.top = top
        self.bottom = bottom
        self.tickets = [ticket for ticket in (top, bottom) if ticket is not None]

    @property
    def landed_s(self) -> float:
        return max(ticket.landed_s for ticket in self.tickets)


class SimulatedResidency:
    def __init__(self, plan: Plan, costs: Costs, layers: Sequence[MoeLayer], with_events: bool) -> None:
        self.plan = plan
        self.now_s = 0.0
        self.token = -1
        self.reply = -1
        self.link = SimulatedLink(costs, with_events)
        self.layers = [
            SimulatedLayer(layer, share, cost, make_policy(plan.eviction, layer.num_experts))
            for layer, share, cost in zip(layers, plan.layers, costs.layers, strict=True)
        ]
        self.predictor = Predictor(len(layers), max_depth=max(1, plan.prefetch_depth))
        matrices = plan.predictor == "activation-matrices"
        self.matrices = ActivationMatrices([layer.num_experts for layer in layers]) if matrices else None
        self.used_bytes = self.wasted_bytes = 0
        self.rows: list[tuple[Any, ...]] = []  # of EVENT
        self.running = 0  # the layer whose time it is
        self._with_events = with_events
        self._after_s = costs.after_s
        # A free buffer is the instant at which the last chunk of a cancelled guess leaves it alone.
        self.free = [-inf] * plan.staging_records
        self.guesses: dict[tuple[int, int], Staged] = {}  # (layer, expert), oldest first
        self.wishes: deque[tuple[int, int]] = deque()

    def remember(self, trace: RoutingTrace) -> None:
        """Policies know what `trace` used, and slots hold what they rank highest, as when the engine has started."""
        for layers in trace.experts.tolist():
            self.token += 1
            for layer, experts in zip(self.layers, layers, strict=True):
                layer.touch([expert for expert in experts if expert >= 0], self.token)
        for layer in self.layers:
            layer.warm_up(self.token)

    def begin_reply(self, reply: int) -> None:
        self.reply = reply
        for layer in self.layers:
            layer.policy.begin_request()
        if self.matrices is not None:
            self.matrices.begin_request()

    def begin_token(self) -> float:
        """The instant at which it begins."""
        self.token += 1
        return self.now_s

    def end_token(self, start_s: float) -> None:
        """Behind its last layer; it began at `start_s`."""
        self.now_s += self._after_s
        self._record_runs()
        self.event(EventKind.TOKEN, Part.WHOLE, -1, -1, 0, start_s)

    def forget_guesses(self) -> None:
        """A reply has ended."""
        self.wishes.clear()
        for key in list(self.guesses):
            self.drop_guess(key)
        self.predictor.forget_open()
        self._record_runs()

    def count_from_here(self) -> None:
        """Forgets all figures and events so far; what is cached, queued and known stays."""
        self.rows.clear()
        self.link.forget_counts()
        self.used_bytes = self.wasted_bytes = 0
        for layer in self.layers:
            layer.forget_counts()

    def check(self) -> None:
        """Raise AssertionError if a buffer or a slot was lost between two tokens."""
        num_buffers = len(self.free) + len(self.guesses)
        assert num_buffers == self.plan.staging_records, (num_buffers, self.plan.staging_records)
        for layer in self.layers:
            layer.check()
        self.link.check()

    def load(self, number: int, expert: int, submit: Submit, with_top: bool) -> Staged:
        """Sends `expert` into a buffer: the bottom, and the top before it when asked."""
        layer, top, bottom = self.layers[number], None, None
        if with_top and layer.rows:
            part = Part.WHOLE if layer.whole else Part.TOP
            top = self.submit(submit, number, expert, part, layer.top_bytes)
        bottom_bytes = layer.bottom_bytes if top is None else layer.rest_bytes
        if bottom_bytes:
            part = Part.BOTTOM if layer.rows else Part.WHOLE
            bottom = self.submit(submit, number, expert, part, bottom_bytes)
        return Staged(top, bottom)

    def submit(self, submit: Submit, number: int, expert: int, part: Part, nbytes: int) -> Ticket:
        """Hands a transfer over, which takes the running layer's time."""
        ticket, costs = submit(number, expert, part, nbytes, self.now_s), self.layers[self.running].costs
        self.now_s += costs.transfer_s + costs.drag * self.link.seconds(nbytes)
        return ticket

    def observe(self, number: int, experts: Sequence[int]) -> None:
        """Layer `number` uses `experts`: what was still wished for it is demanded now or was wrong."""
        self.wishes.clear()
        self.predictor.observe(number, experts)
        if self.matrices is not None:
            self.matrices.observe(number, experts)
        self.link.advance(self.now_s)

    def prefetch(self, number: int, guesses: Sequence[int]) -> None:
        """Asks the router of layer `number` ahead of time, which ranked `guesses`, and sends what may be missing."""
        if self.plan.predictor == "none" or self.layers[number].resident:
            return
        self.now_s += self.layers[self.running].costs.guess_s
        ranked = self.matrices.rank(number) if self.matrices is not None else guesses
        depth = self.plan.prefetch_depth
        for guess in self.predictor.propose(number, [expert for expert in ranked[:depth] if expert >= 0]):
            self.wishes.append((number, guess.expert))
        self.place_wishes()

    def place_wishes(self) -> None:
        """Starts as many queued guesses as there are free buffers."""
        while self.wishes and self.free:
            number, expert = key = self.wishes.popleft()
            layer = self.layers[number]
            top_cached = expert in layer.cached
            if key in self.guesses or (top_cached and layer.whole):
                continue
            self.take_buffer()
            self.guesses[key] = self.load(number, expert, self.link.prefetch, with_top=not top_cached)

    def drop_guess(self, key: tuple[int, int]) -> None:
        """The guess was wrong."""
        staged = self.guesses.pop(key)
        for ticket in staged.tickets:
            self.link.cancel(ticket, self.now_s)
        self.count_prefetched(EventKind.WASTED, *key, staged)
        self.free.append(max(ticket.taken_s for ticket in staged.tickets))

    def count_prefetched(self, kind: EventKind, number: int, expert: int, staged: Staged) -> None:
        """A guess ended as USED or WASTED."""
        nbytes = sum(ticket.taken_bytes for ticket in staged.tickets)
        if kind is EventKind.USED:
            self.used_bytes += nbytes
        else:
            self.wasted_bytes += nbytes
        self.event(kind, Part.WHOLE, number, expert, nbytes, self.now_s)

    def take_buffer(self) -> None:
        """The first buffer that no chunk is on its way to; or else the first, once that chunk has landed."""
        place = next((place for place, quiet_s in enumerate(self.free) if quiet_s <= self.now_s), 0)
        self.wait_until(self.free.pop(place))

    def wait_until(self, instant_s: float) -> None:
        if instant_s > self.now_s:
            start_s, self.now_s = self.now_s, instant_s
            self.layers[self.running].stall_s += instant_s - start_s
            self.event(EventKind.STALL, Part.WHOLE, self.running, -1, 0, start_s)

    def _record_runs(self) -> None:
        if not self._with_events:
            return
        for run in self.link.drain_runs():
            kind = EventKind.DEMAND if run.demand else EventKind.PREFETCH
            head = (kind, TracePhase.DECODE, run.part, run.layer, run.expert, self.reply, self.token)
            self.rows.append((*head, run.nbytes, run.start_s, run.end_s))

    def event(self, kind: EventKind, part: Part, number: int, expert: int, nbytes: int, start_s: float) -> None:
        """One that ends now, if events are kept."""
        if self._with_events:
            head = (kind, TracePhase.DECODE, part, number, expert, self.reply, self.token, nbytes)
            self.rows.append((*head, start_s, self.now_s))
