"""The engine without tensors: caches, staging and the order of computation of `residency`, over a simulated link.

`simulator` drives it token by token. It takes the same decisions as `step.Step` in the same order and asks the
same policies and predictors; the methods bear the names of what they mirror, and a test compares both use by use.
Where the engine waits, the simulated clock moves on. Decode only. Keeps counters and, when asked, rows of EVENT.
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
from .trace import EventKind, Outcome, Part, TracePhase

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


class Need:
    """One expert that the running layer uses."""

    __slots__ = ("expert", "has_slot", "left", "staged", "waiting", "was_guess")

    def __init__(self, expert: int, has_slot: bool) -> None:
        self.expert = expert
        self.has_slot = has_slot
        self.staged: Staged | None = None
        self.was_guess = False
        self.waiting = False  # for a staging buffer
        self.left = 0  # segments to be computed


class SimulatedEngine:
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
        self._with_events = with_events
        self._after_s = costs.after_s
        # A free buffer is the instant at which the last chunk of a cancelled guess leaves it alone.
        self._free = [-inf] * plan.staging_records
        self._guesses: dict[tuple[int, int], Staged] = {}  # (layer, expert), oldest first
        self._wishes: deque[tuple[int, int]] = deque()
        # The running layer
        self._number = 0
        self._layer = self.layers[0]
        self._wanted: Sequence[int] = ()
        self._ready: deque[tuple[Need, Part]] = deque()
        self._arriving: list[tuple[float, Need, Part]] = []  # behind the instant of arrival
        self._waiting: deque[Need] = deque()

    @property
    def num_guesses(self) -> int:
        """Staging buffers that hold guesses."""
        return len(self._guesses)

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

    def run_token(self, experts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> None:
        """One token: `experts[layer]` are used, and while a layer runs `guesses[layer]` are prefetched for the next."""
        self.token += 1
        start_s = self.now_s
        for number, (used, guessed) in enumerate(zip(experts, guesses, strict=True)):
            self._step(number, [expert for expert in used if expert >= 0], guessed)
        self.now_s += self._after_s
        if self._with_events:
            self._record_runs()
            self._event(EventKind.TOKEN, Part.WHOLE, -1, -1, 0, start_s)

    def forget_guesses(self) -> None:
        """A reply has ended."""
        self._wishes.clear()
        for key in list(self._guesses):
            self._drop_guess(key)
        self.predictor.forget_open()
        if self._with_events:
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
        num_buffers = len(self._free) + len(self._guesses)
        assert num_buffers == self.plan.staging_records, (num_buffers, self.plan.staging_records)
        assert not self._ready and not self._arriving and not self._waiting, (self._ready, self._arriving)
        for layer in self.layers:
            layer.check()
        self.link.check()

    def _step(self, number: int, experts: Sequence[int], guesses: Sequence[int]) -> None:
        self._number, self._wanted = number, experts
        layer = self._layer = self.layers[number]
        self.now_s += layer.costs.before_s
        start_s = self.now_s
        self._begin(experts)
        self._prefetch_next((number + 1) % len(self.layers), guesses)
        self._compute()
        self.now_s += layer.costs.step_s
        if self._with_events:
            self._event(EventKind.STEP, Part.WHOLE, number, -1, 0, start_s)

    def _begin(self, experts: Sequence[int]) -> None:
        layer = self._layer
        layer.touch(experts, self.token)
        for key in [key for key in self._guesses if key[0] == self._number and key[1] not in experts]:
            self._drop_guess(key)
        self._wishes.clear()
        self.predictor.observe(self._number, experts)
        if self.matrices is not None:
            self.matrices.observe(self._number, experts)
        self.link.advance(self.now_s)
        for need in [self._classify(expert) for expert in experts]:
            self._demand(need)

    def _classify(self, expert: int) -> Need:
        layer = self._layer
        need = Need(expert, expert in layer.cached)
        top_here, bottom_here = need.has_slot or layer.rows == 0, layer.whole
        guess = self._guesses.pop((self._number, expert), None)
        if guess is not None:
            need.staged, need.was_guess = guess, True
            top_here = top_here or (guess.top is not None and guess.top.landed_s <= self.now_s)
            bottom_here = bottom_here or guess.landed_s <= self.now_s
            for ticket in guess.tickets:
                self.link.promote(ticket, self.now_s)
        if top_here and bottom_here:
            outcome = Outcome.HIT
        else:
            outcome = Outcome.PARTIAL if top_here and layer.rows else Outcome.MISS
        layer.outcomes[outcome] += 1
        return need

    def _demand(self, need: Need) -> None:
        layer = self._layer
        top_missing = layer.rows > 0 and not need.has_slot and need.staged is None
        top_landed_s = -inf
        if top_missing and layer.make_room(need.expert, self._wanted, self.token):
            need.has_slot, top_missing = True, False
            top = self.link.demand(self._number, need.expert, Part.TOP, layer.top_bytes, self.now_s)
            top_landed_s = top.landed_s
        if need.has_slot:
            self._queue(need, Part.TOP, top_landed_s)
        if need.staged is not None:
            self._queue_staged(need)
        elif top_missing or not layer.whole:
            self._stage(need, with_top=top_missing)

    def _stage(self, need: Need, with_top: bool) -> None:
        """Demands into a staging buffer, or waits for one. The engine would take a guess's buffer away, but while it
        decodes there is none here: this layer's guesses are needs or dropped by now, the next layer's come later.
        """
        need.waiting = not self._free
        if need.waiting:
            self._waiting.append(need)
            return
        self._take_buffer()
        need.staged = self._load(self._number, need.expert, self.link.demand, with_top)
        self._queue_staged(need)

    def _queue_staged(self, need: Need) -> None:
        staged, layer = need.staged, self._layer
        assert staged is not None
        if staged.top is not None and not need.has_slot:
            self._queue(need, Part.TOP, staged.top.landed_s)
        if not layer.whole:
            self._queue(need, Part.BOTTOM, staged.landed_s)

    def _queue(self, need: Need, part: Part, landed_s: float) -> None:
        need.left += 1
        if landed_s == -inf:
            self._ready.append((need, part))
        else:
            self._arriving.append((landed_s, need, part))

    def _load(self, number: int, expert: int, submit: Submit, with_top: bool) -> Staged:
        """Sends `expert` into a buffer: the bottom, and the top before it when asked."""
        layer, top, bottom = self.layers[number], None, None
        if with_top and layer.rows:
            part = Part.WHOLE if layer.whole else Part.TOP
            top = submit(number, expert, part, layer.top_bytes, self.now_s)
        bottom_bytes = layer.bottom_bytes if top is None else layer.rest_bytes
        if bottom_bytes:
            part = Part.BOTTOM if layer.rows else Part.WHOLE
            bottom = submit(number, expert, part, bottom_bytes, self.now_s)
        return Staged(top, bottom)

    def _prefetch_next(self, number: int, guesses: Sequence[int]) -> None:
        if self.plan.predictor == "none" or self.layers[number].resident:
            return
        self.now_s += self._layer.costs.guess_s
        ranked = self.matrices.rank(number) if self.matrices is not None else guesses
        depth = self.plan.prefetch_depth
        for guess in self.predictor.propose(number, [expert for expert in ranked[:depth] if expert >= 0]):
            self._wishes.append((number, guess.expert))
        self._place_wishes()

    def _place_wishes(self) -> None:
        while self._wishes and self._free:
            number, expert = key = self._wishes.popleft()
            layer = self.layers[number]
            top_cached = expert in layer.cached
            if key in self._guesses or (top_cached and layer.whole):
                continue
            self._take_buffer()
            self._guesses[key] = self._load(number, expert, self.link.prefetch, with_top=not top_cached)

    def _compute(self) -> None:
        """Ready segments first, then the first that has arrived, or else the first that was asked for."""
        ready, arriving, layer = self._ready, self._arriving, self._layer
        while ready or arriving:
            if ready:
                need, part = ready.popleft()
            else:
                place = next((place for place, (landed_s, *_) in enumerate(arriving) if landed_s <= self.now_s), 0)
                landed_s, need, part = arriving.pop(place)
                self._wait_until(landed_s)
            start_s = self.now_s
            self.now_s += layer.top_s if part is Part.TOP else layer.bottom_s
            if self._with_events:
                whole = layer.whole or not layer.rows
                self._event(EventKind.COMPUTE, Part.WHOLE if whole else part, self._number, need.expert, 0, start_s)
            need.left -= 1
            if not need.left and not need.waiting:
                self._finish(need)

    def _finish(self, need: Need) -> None:
        if need.staged is not None:
            if not need.has_slot and need.staged.top is not None:
                self._admit(need.expert)
            if need.was_guess:
                self.used_bytes += self._count_prefetched(EventKind.USED, self._number, need.expert, need.staged)
            self._free.append(-inf)
        if self._waiting and self._free:
            waiting = self._waiting.popleft()
            self._stage(waiting, with_top=not waiting.has_slot and self._layer.rows > 0)
        elif not self._waiting:
            self._place_wishes()

    def _admit(self, expert: int) -> None:
        """Copies a newcomer's top from staging into a slot, on the device, if there is one."""
        if self._layer.make_room(expert, self._wanted, self.token):
            self.now_s += self._layer.admit_s

    def _drop_guess(self, key: tuple[int, int]) -> None:
        staged = self._guesses.pop(key)
        for ticket in staged.tickets:
            self.link.cancel(ticket, self.now_s)
        self.wasted_bytes += self._count_prefetched(EventKind.WASTED, *key, staged)
        self._free.append(max(ticket.taken_s for ticket in staged.tickets))

    def _count_prefetched(self, kind: EventKind, number: int, expert: int, staged: Staged) -> int:
        nbytes = sum(ticket.taken_bytes for ticket in staged.tickets)
        if self._with_events:
            self._event(kind, Part.WHOLE, number, expert, nbytes, self.now_s)
        return nbytes

    def _take_buffer(self) -> None:
        """The first buffer that no chunk is on its way to; or else the first, once that chunk has landed."""
        place = next((place for place, quiet_s in enumerate(self._free) if quiet_s <= self.now_s), 0)
        self._wait_until(self._free.pop(place))

    def _wait_until(self, instant_s: float) -> None:
        if instant_s > self.now_s:
            start_s, self.now_s = self.now_s, instant_s
            self._layer.stall_s += instant_s - start_s
            if self._with_events:
                self._event(EventKind.STALL, Part.WHOLE, self._number, -1, 0, start_s)

    def _record_runs(self) -> None:
        for run in self.link.drain_runs():
            kind = EventKind.DEMAND if run.demand else EventKind.PREFETCH
            head = (kind, TracePhase.DECODE, run.part, run.layer, run.expert, self.reply, self.token)
            self.rows.append((*head, run.nbytes, run.start_s, run.end_s))

    def _event(self, kind: EventKind, part: Part, number: int, expert: int, nbytes: int, start_s: float) -> None:
        """One that ends now."""
        head = (kind, TracePhase.DECODE, part, number, expert, self.reply, self.token, nbytes)
        self.rows.append((*head, start_s, self.now_s))
