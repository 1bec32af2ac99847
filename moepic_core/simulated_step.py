"""One simulated token, layer by layer: `step.Step` without tensors, decision by decision.

`simulator` calls `run_token`. What a layer lacks is demanded at once, and its segments are computed in the order of
readiness: resident ones first, then the first that has arrived, or else the first that was asked for. Decode only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from .simulated_residency import SimulatedResidency, Staged
from .trace import EventKind, Outcome, Part


def run_token(
    residency: SimulatedResidency, experts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]
) -> None:
    """`experts[layer]` are used, and while a layer runs `guesses[layer]` are prefetched for the next."""
    start_s = residency.begin_token()
    for number, (used, guessed) in enumerate(zip(experts, guesses, strict=True)):
        residency.now_s += residency.layers[number].costs.before_s
        SimulatedStep(residency, number, [expert for expert in used if expert >= 0]).run(guessed)
    residency.end_token(start_s)


class Need:
    """One expert that the layer uses."""

    __slots__ = ("expert", "has_slot", "left", "staged", "waiting", "was_guess")

    def __init__(self, expert: int, has_slot: bool) -> None:
        self.expert = expert
        self.has_slot = has_slot
        self.staged: Staged | None = None
        self.was_guess = False
        self.waiting = False  # for a staging buffer
        self.left = 0  # segments to be computed


class SimulatedStep:
    __slots__ = ("_arriving", "_ready", "_waiting", "experts", "layer", "number", "residency")

    def __init__(self, residency: SimulatedResidency, number: int, experts: Sequence[int]) -> None:
        self.residency = residency
        self.number = residency.running = number
        self.layer = residency.layers[number]
        self.experts = experts
        self._ready: deque[tuple[Need, Part]] = deque()
        self._arriving: list[tuple[float, Need, Part]] = []  # behind the instant of arrival
        self._waiting: deque[Need] = deque()

    def run(self, guesses: Sequence[int]) -> None:
        """From the router's answer until the last segment is computed; `guesses` are the next layer's."""
        residency, start_s = self.residency, self.residency.now_s
        self._begin()
        residency.prefetch((self.number + 1) % len(residency.layers), guesses)
        self._compute()
        assert not self._waiting, "a need is left without a buffer"
        residency.now_s += self.layer.costs.step_s
        residency.event(EventKind.STEP, Part.WHOLE, self.number, -1, 0, start_s)

    def _begin(self) -> None:
        residency = self.residency
        self.layer.touch(self.experts, residency.token)
        for key in [key for key in residency.guesses if key[0] == self.number and key[1] not in self.experts]:
            residency.drop_guess(key)
        residency.observe(self.number, self.experts)
        for need in [self._classify(expert) for expert in self.experts]:
            self._demand(need)

    def _classify(self, expert: int) -> Need:
        residency, layer = self.residency, self.layer
        need = Need(expert, expert in layer.cached)
        top_here, bottom_here = need.has_slot or layer.rows == 0, layer.whole
        guess = residency.guesses.pop((self.number, expert), None)
        if guess is not None:
            need.staged, need.was_guess = guess, True
            top_here = top_here or (guess.top is not None and guess.top.landed_s <= residency.now_s)
            bottom_here = bottom_here or guess.landed_s <= residency.now_s
            for ticket in guess.tickets:
                residency.link.promote(ticket, residency.now_s)
        if top_here and bottom_here:
            outcome = Outcome.HIT
        else:
            outcome = Outcome.PARTIAL if top_here and layer.rows else Outcome.MISS
        layer.outcomes[outcome] += 1
        return need

    def _demand(self, need: Need) -> None:
        residency, layer = self.residency, self.layer
        top_missing = layer.rows > 0 and not need.has_slot and need.staged is None
        top_landed_s = -inf
        if top_missing and layer.make_room(need.expert, self.experts, residency.token):
            need.has_slot, top_missing = True, False
            top = residency.submit(residency.link.demand, self.number, need.expert, Part.TOP, layer.top_bytes)
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
        residency = self.residency
        need.waiting = not residency.free
        if need.waiting:
            self._waiting.append(need)
            return
        residency.take_buffer()
        need.staged = residency.load(self.number, need.expert, residency.link.demand, with_top)
        self._queue_staged(need)

    def _queue_staged(self, need: Need) -> None:
        staged = need.staged
        assert staged is not None
        if staged.top is not None and not need.has_slot:
            self._queue(need, Part.TOP, staged.top.landed_s)
        if not self.layer.whole:
            self._queue(need, Part.BOTTOM, staged.landed_s)

    def _queue(self, need: Need, part: Part, landed_s: float) -> None:
        need.left += 1
        if landed_s == -inf:
            self._ready.append((need, part))
        else:
            self._arriving.append((landed_s, need, part))

    def _compute(self) -> None:
        residency, ready, arriving, layer = self.residency, self._ready, self._arriving, self.layer
        whole = layer.whole or not layer.rows
        while ready or arriving:
            if ready:
                need, part = ready.popleft()
            else:
                now_s = residency.now_s
                place = next((place for place, (landed_s, *_) in enumerate(arriving) if landed_s <= now_s), 0)
                landed_s, need, part = arriving.pop(place)
                residency.wait_until(landed_s)
            start_s = residency.now_s
            residency.now_s += layer.top_s if part is Part.TOP else layer.bottom_s
            residency.event(EventKind.COMPUTE, Part.WHOLE if whole else part, self.number, need.expert, 0, start_s)
            need.left -= 1
            if not need.left and not need.waiting:
                self._finish(need)

    def _finish(self, need: Need) -> None:
        residency = self.residency
        if need.staged is not None:
            if not need.has_slot and need.staged.top is not None:
                self._admit(need.expert)
            if need.was_guess:
                residency.count_prefetched(EventKind.USED, self.number, need.expert, need.staged)
            residency.free.append(-inf)
        if self._waiting and residency.free:
            waiting = self._waiting.popleft()
            self._stage(waiting, with_top=not waiting.has_slot and self.layer.rows > 0)
        elif not self._waiting:
            residency.place_wishes()

    def _admit(self, expert: int) -> None:
        """A newcomer's top moves from staging into a slot, if there is one: copied, or with its buffer."""
        residency, layer, start_s = self.residency, self.layer, self.residency.now_s
        if layer.make_room(expert, self.experts, residency.token):
            residency.now_s += layer.admit_s
            if not layer.whole:
                residency.event(EventKind.ADMIT, Part.TOP, self.number, expert, layer.top_bytes, start_s)
