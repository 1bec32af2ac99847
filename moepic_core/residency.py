"""The heart: brings a layer's experts to where they are computed, and decides what stays.

The only place where cache, host store, transfer, eviction, predictor and telemetry meet. The adapter opens a `Step`
for each MoE layer, asks for a prefetch of the next, and computes the pieces that the step hands out in the order of
readiness: resident segments first, then each arriving segment as its ticket completes. All state changes happen on the
compute thread. Does no arithmetic on weights and knows no stream, thread or file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .activation_matrices import ActivationMatrices
from .arena import Arena
from .device_cache import LayerCache, Slot, SlotState
from .errors import Cancelled
from .eviction import EvictionPolicy, make_policy
from .geometry import Segment, record_stride, segment
from .host_store import HostStore
from .packing import rows_of
from .predictor import Predictor
from .routing import RoutingTrace
from .spec import MoeLayer, Plan
from .staging import Staging, StagingBuffer
from .telemetry import Telemetry
from .trace import EventKind, Outcome, Part
from .transfer.base import Priority, Ticket, Transfer


class Piece(NamedTuple):
    """One segment, ready to compute with."""

    expert: int
    start_row: int
    weights: Tensor  # [rows, matrices, hidden]


class Tag(NamedTuple):
    """What a transfer carries; comes back with its times."""

    layer: int
    expert: int
    part: Part


class Residency:
    def __init__(
        self,
        layers: Sequence[MoeLayer],
        dtype: torch.dtype,
        store: HostStore,
        transfer: Transfer,
        arena: Arena,
        telemetry: Telemetry,
        cancelled: Callable[[], bool],
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self.store = store
        self.transfer = transfer
        self.arena = arena
        self.telemetry = telemetry
        self.cancelled = cancelled
        self.caches = [LayerCache(layer, dtype, arena) for layer in layers]
        self.staging = Staging(arena)
        self.policies: list[EvictionPolicy] = []
        self.predictor = Predictor(len(layers), max_depth=1)
        self.matrices: ActivationMatrices | None = None  # of requests, where the plan's predictor guesses from them
        self.plan: Plan | None = None
        self.token = 0  # number of the first token of the running pass, counted over the engine's life
        self.decode = True
        self.precise = False  # for measuring: wait after each segment until the device has computed it
        self._pass_tokens = 0
        self.wishes: deque[tuple[int, int]] = deque()  # (layer, expert) still to be prefetched, best first

    def apply(self, plan: Plan) -> None:
        """Makes the device look as `plan` says, between two forward passes. Gives back memory before it takes any."""
        self.forget_guesses()
        if self.plan is None or self.plan.eviction != plan.eviction:
            self.policies = [make_policy(plan.eviction, layer.num_experts) for layer in self.layers]
        if self.plan is None or self.plan.prefetch_depth != plan.prefetch_depth:
            self.predictor = Predictor(len(self.layers), max_depth=max(1, plan.prefetch_depth))
        if plan.predictor != "activation-matrices":
            self.matrices = None
        elif self.matrices is None:
            self.matrices = ActivationMatrices([layer.num_experts for layer in self.layers])
        self.plan = plan
        for cache, policy, share in zip(self.caches, self.policies, plan.layers, strict=True):
            cache.shrink(share.slots, share.top_rows, policy.ranking(self.token))
        self.arena.budget_bytes = plan.memory.budget
        self.staging.resize(plan.staging_records, max(record_stride(layer) for layer in self.layers))
        try:
            for cache, share in zip(self.caches, plan.layers, strict=True):
                cache.grow(share.slots)
        finally:
            # The memory of new buffers may have served computations that are still under way on the device.
            fence = self.transfer.fence()
            for buffer in self.staging.free:
                buffer.fence = buffer.fence or fence
            for slot in (slot for cache in self.caches for slot in cache.slots):
                slot.fence = slot.fence or fence

    @contextmanager
    def rehearsal(self, plan: Plan) -> Iterator[None]:
        """Within, `plan` holds and everything is recorded apart, precisely; the caller applies its own plan after."""
        names = ("telemetry", "policies", "predictor", "matrices", "token", "_pass_tokens", "plan")
        kept = {name: getattr(self, name) for name in names}
        self.telemetry, self.policies, self.plan = self.telemetry.fresh(), [], None
        self.token, self._pass_tokens, self.precise = 0, 0, True
        try:
            self.apply(plan)
            yield
        finally:
            self.forget_guesses()
            self.transfer.drain_events()
            vars(self).update(kept)
            self.precise = False

    def remember(self, trace: RoutingTrace) -> None:
        """Tells the eviction policies what earlier tokens used, as if they had just been made."""
        self.token = max(self.token, trace.num_tokens)
        for now, layers in enumerate(trace.experts.tolist(), start=self.token - trace.num_tokens):
            for policy, experts in zip(self.policies, layers, strict=True):
                for expert in experts:
                    if expert >= 0:
                        policy.touch(expert, now)

    def warm_up(self) -> None:
        """Fills free slots with the tops that the eviction policies rank highest."""
        for layer, (cache, policy) in enumerate(zip(self.caches, self.policies, strict=True)):
            missing = [expert for expert in policy.ranking(self.token) if cache.find(expert) is None]
            loads = []
            for expert in missing:
                slot = cache.free_slot()
                if slot is None:
                    break
                cache.claim(slot, expert)
                loads.append((slot, self.load_top(layer, slot)))
            for slot, ticket in loads:
                ticket.wait(self.cancelled)
                cache.arrived(slot)
                cache.release(slot, None)
        self.transfer.drain_events()

    def empty(self) -> None:
        """Nothing is cached, guessed or known of earlier tokens; `apply` must follow."""
        self.forget_guesses()
        for cache in self.caches:
            cache.shrink(0, cache.top_rows, [])
        self.policies, self.matrices, self.plan = [], None, None

    def begin_reply(self) -> None:
        """A request starts: policies and predictors that think in requests hear of it."""
        for policy in self.policies:
            policy.begin_request()
        if self.matrices is not None:
            self.matrices.begin_request()

    def begin_pass(self, tokens: int) -> None:
        """A forward pass over `tokens` new tokens starts. One token is decoding, more are prefill."""
        self.token += self._pass_tokens
        self._pass_tokens = tokens
        self.decode = tokens == 1

    def wants_guesses(self, layer: int) -> bool:
        """Whether a prediction for `layer` is of any use: prefetch is on, and not all of the layer is resident."""
        cache, geometry = self.caches[layer], self.layers[layer]
        assert self.plan is not None
        whole = cache.top_rows == geometry.neurons and len(cache.expert_to_slot) == geometry.num_experts
        return self.plan.predictor != "none" and not whole

    def step(self, layer: int, counts: Mapping[int, int]) -> Step:
        """One MoE layer that needs the experts `counts` (expert → tokens routed to it). Use as a context manager."""
        if self.cancelled():
            raise Cancelled("stopped by the user")
        return Step(self, layer, counts)

    def end_pass(self) -> int:
        """The pass is over: hands the link's events to telemetry. Returns the number of the pass's last token."""
        last = self.token + self._pass_tokens - 1
        for event in self.transfer.drain_events():
            kind = EventKind.DEMAND if event.priority is Priority.DEMAND else EventKind.PREFETCH
            assert isinstance(event.tag, Tag), event.tag
            self.telemetry.event(kind, *event.tag, event.start_s, event.end_s, event.nbytes, last)
        return last

    def prefetch(self, layer: int, ranked: Sequence[int]) -> None:
        """Queues guesses for `layer`, the next to run, best first. They never delay a demand."""
        assert self.plan is not None
        if self.decode:
            guesses = self.predictor.propose(layer, ranked[: self.plan.prefetch_depth])
            ranked = [guess.expert for guess in guesses]
        self.wishes = deque((layer, expert) for expert in ranked)
        self.place_wishes()

    def place_wishes(self) -> None:
        """Starts as many queued guesses as staging has free buffers."""
        while self.wishes and self.staging.free:
            layer, expert = self.wishes.popleft()
            cache = self.caches[layer]
            top_cached = cache.find(expert) is not None
            if self.staging.find_guess(layer, expert) is not None or (
                top_cached and cache.top_rows == self.layers[layer].neurons
            ):
                continue
            buffer = self.staging.take_guess(layer, expert)
            assert buffer is not None
            self.load(buffer, Priority.PREFETCH, with_top=not top_cached)

    def load(self, buffer: StagingBuffer, priority: Priority, with_top: bool) -> None:
        """Sends the buffer's expert into it: the bottom, and the top before it when asked."""
        geometry, top = self.layers[buffer.layer], self.caches[buffer.layer].top
        sent = 0  # bytes of the record that the top carries already
        if with_top and top is not None:
            buffer.top = self._submit(
                buffer, top, Part.TOP if top.stop_row < geometry.neurons else Part.WHOLE, priority
            )
            sent = top.stop
        rows = 0 if top is None else top.stop_row
        if rows < geometry.neurons and sent < record_stride(geometry):
            bottom = segment(geometry, rows, geometry.neurons)
            bottom = replace(bottom, start=max(bottom.start, sent))
            buffer.bottom = self._submit(buffer, bottom, Part.BOTTOM if rows else Part.WHOLE, priority)

    def load_top(self, layer: int, slot: Slot) -> Ticket:
        """Demands the top of the slot's expert straight into the slot."""
        top = self.caches[layer].top
        assert top is not None
        source = self.store.source(layer, slot.expert, top)
        tag = Tag(layer, slot.expert, Part.TOP)
        return self.transfer.submit(source, slot.buffer, Priority.DEMAND, tag=tag, after=slot.fence)

    def room_for_top(self, layer: int, expert: int, protected: Collection[int]) -> Slot | None:
        """A free slot claimed for `expert`, after evicting if need be; None when all slots are protected."""
        cache, policy = self.caches[layer], self.policies[layer]
        slot = cache.free_slot()
        if slot is None:
            candidates = cache.evictable(protected)
            if not candidates:
                return None
            victim = policy.victim(candidates, self.token)
            # While decoding, the needed expert always gets in (paper). A prompt touches nearly all experts, so
            # there the better one stays (ours).
            if not self.decode and policy.priority(victim, self.token) >= policy.priority(expert, self.token):
                return None
            slot = cache.expert_to_slot[victim]
            cache.forget(slot)
        cache.claim(slot, expert)
        return slot

    def drop_guess(self, buffer: StagingBuffer) -> None:
        """A guess is not wanted: stop what has not travelled, and count what did as wasted."""
        for ticket in buffer.tickets():
            self.transfer.cancel(ticket)
        self.count_prefetched(EventKind.WASTED, buffer)
        self.staging.give_back(buffer, None)

    def count_prefetched(self, kind: EventKind, buffer: StagingBuffer) -> None:
        """Tells telemetry what became of a guess's bytes, as far as they travelled."""
        nbytes = sum(ticket.taken_bytes for ticket in buffer.tickets())
        now_s = time.perf_counter()
        self.telemetry.event(kind, buffer.layer, buffer.expert, Part.WHOLE, now_s, now_s, nbytes, self.token)

    def forget_guesses(self) -> None:
        """Drops all guesses, at a change of plan or when a generation ends early."""
        self.wishes.clear()
        for buffer in list(self.staging.guesses.values()):
            self.drop_guess(buffer)
        self.predictor.forget_open()

    def where(self) -> list[list[int]]:
        """Per layer and expert: 0 nothing on the device, 1 the top, 2 the whole expert."""
        rows = []
        for layer, cache in zip(self.layers, self.caches, strict=True):
            value = 2 if cache.top_rows == layer.neurons else 1
            row = [0] * layer.num_experts
            for expert in list(cache.expert_to_slot):
                row[expert] = value
            rows.append(row)
        return rows

    def check(self) -> None:
        for cache in self.caches:
            cache.check()
        self.staging.check()
        self.transfer.check()

    def close(self) -> None:
        self.forget_guesses()
        self.transfer.close()
        for cache in self.caches:
            cache.close()
        self.staging.resize(0, 0)

    def _submit(self, buffer: StagingBuffer, wanted: Segment, part: Part, priority: Priority) -> Ticket:
        return self.transfer.submit(
            self.store.source(buffer.layer, buffer.expert, wanted),
            buffer.buffer[wanted.start : wanted.stop],
            priority,
            tag=Tag(buffer.layer, buffer.expert, part),
            after=buffer.fence,
        )


class _Need:
    """One needed expert while its layer runs."""

    __slots__ = ("expert", "left", "slot", "staged", "top_ticket", "was_guess")

    def __init__(self, expert: int) -> None:
        self.expert = expert
        self.slot: Slot | None = None
        self.staged: StagingBuffer | None = None
        self.top_ticket: Ticket | None = None  # of a demand that travels straight into the slot
        self.was_guess = False
        self.left = 0  # pieces not computed yet


class _Part(NamedTuple):
    need: _Need
    start_row: int
    tickets: Sequence[Ticket]  # all must be done before its weights may be read

    def arrived(self) -> bool:
        return all(ticket.done for ticket in self.tickets)


class Step:
    """One MoE layer of one pass: demands at once what is missing, then iterates over pieces in the order of
    readiness.
    """

    def __init__(self, residency: Residency, layer: int, counts: Mapping[int, int]) -> None:
        self.residency = residency
        self.layer = layer
        self.cache = residency.caches[layer]
        self.open: dict[int, _Need] = {}
        self._protected: Collection[int] = counts if residency.decode else self.open
        self._ready: deque[_Part] = deque()
        self._arriving: list[_Part] = []
        self._waiting: deque[_Need] = deque()  # for a staging buffer
        self._counts = counts
        self._start_s = time.perf_counter()

    def __enter__(self) -> Step:
        try:
            self._begin(self._counts)
        except BaseException:
            self._abandon_all()
            raise
        return self

    def __iter__(self) -> Iterator[Piece]:
        while self._ready or self._arriving:
            need, start_row, _ = part = self._next()
            piece = Piece(need.expert, start_row, self._weights(part))
            start_s = time.perf_counter()
            yield piece
            self._computed(piece, start_s)
            need.left -= 1
            if need.left == 0 and need not in self._waiting:
                self._finish(need)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error or a stop: nothing stays half-arrived, and every buffer is free again."""
        assert kind is not None or not self.open, sorted(self.open)
        self._abandon_all()
        telemetry, token = self.residency.telemetry, self.residency.token
        telemetry.event(EventKind.STEP, self.layer, -1, Part.WHOLE, self._start_s, time.perf_counter(), 0, token)

    def _begin(self, counts: Mapping[int, int]) -> None:
        residency, layer = self.residency, self.layer
        residency.wishes.clear()  # this layer is here: what was wished for it is demanded now or was wrong
        policy = residency.policies[layer]
        for expert, count in counts.items():
            policy.touch(expert, residency.token, count)
        for guessed_layer, expert in list(residency.staging.guesses):
            if guessed_layer == layer and expert not in counts:
                residency.drop_guess(residency.staging.guesses[layer, expert])
        guesses = residency.predictor.observe(layer, counts) if residency.decode else ()
        if residency.matrices is not None and residency.decode:
            residency.matrices.observe(layer, counts)
        outcomes = [self._classify(expert) for expert in counts]
        residency.telemetry.layer_step(layer, residency.token, list(counts), outcomes, list(counts.values()), guesses)
        for need in list(self.open.values()):
            self._demand(need)

    def _classify(self, expert: int) -> Outcome:
        """Registers the need, takes what is already on the device, and says how much that is."""
        staging, cache = self.residency.staging, self.cache
        need = self.open[expert] = _Need(expert)
        whole = cache.geometry.neurons
        need.slot = cache.find(expert)
        if need.slot is not None:
            cache.use(need.slot)
        top_here, bottom_here = need.slot is not None or cache.top_rows == 0, cache.top_rows == whole
        guess = staging.find_guess(self.layer, expert)
        if guess is not None:
            staging.guess_came_true(guess)
            need.staged, need.was_guess = guess, True
            top_here = top_here or (guess.top is not None and guess.top.done)
            bottom_here = bottom_here or all(ticket.done for ticket in guess.tickets())
            for ticket in guess.tickets():
                if not ticket.done:
                    self.residency.transfer.promote(ticket)
        if top_here and bottom_here:
            return Outcome.HIT
        return Outcome.PARTIAL if top_here and cache.top_rows > 0 else Outcome.MISS

    def _demand(self, need: _Need) -> None:
        """Starts what is missing, tops first, and queues the need's pieces."""
        residency, rows, whole = self.residency, self.cache.top_rows, self.cache.geometry.neurons
        top_missing = rows > 0 and need.slot is None and (need.staged is None or need.staged.top is None)
        assert not (top_missing and need.staged), f"a guess of expert {need.expert} lacks its top"
        if top_missing and residency.decode:
            need.slot = residency.room_for_top(self.layer, need.expert, self._protected)
            if need.slot is not None:
                need.top_ticket = residency.load_top(self.layer, need.slot)
                top_missing = False
        if need.slot is not None:
            self._queue(need, 0, () if need.top_ticket is None else (need.top_ticket,))
        if need.staged is not None:
            self._queue_staged(need)
        elif top_missing or rows < whole:
            self._stage(need, with_top=top_missing)

    def _stage(self, need: _Need, with_top: bool) -> None:
        """Demands into a staging buffer; a guess gives its buffer up, and without any the need waits for its own
        kind.
        """
        staging = self.residency.staging
        if not staging.free and staging.guesses:
            self.residency.drop_guess(next(reversed(staging.guesses.values())))
        need.staged = staging.take_demand(self.layer, need.expert)
        if need.staged is None:
            self._waiting.append(need)
            return
        self.residency.load(need.staged, Priority.DEMAND, with_top)
        self._queue_staged(need)

    def _queue_staged(self, need: _Need) -> None:
        assert need.staged is not None
        if need.staged.top is not None and need.slot is None:
            self._queue(need, 0, (need.staged.top,))
        if self.cache.top_rows < self.cache.geometry.neurons:
            self._queue(need, self.cache.top_rows, need.staged.tickets())

    def _queue(self, need: _Need, start_row: int, tickets: Sequence[Ticket]) -> None:
        need.left += 1
        if tickets:
            self._arriving.append(_Part(need, start_row, tickets))
        else:
            self._ready.append(_Part(need, start_row, tickets))

    def _next(self) -> _Part:
        """The next piece whose data is here; waits (and counts a stall) only when nothing is."""
        if self._ready:
            return self._ready.popleft()
        position = next((place for place, part in enumerate(self._arriving) if part.arrived()), 0)
        part = self._arriving[position]
        start_s = time.perf_counter()
        stalled_s = sum(ticket.wait(self.residency.cancelled) for ticket in part.tickets)
        if stalled_s > 0:
            telemetry, token = self.residency.telemetry, self.residency.token
            telemetry.event(EventKind.STALL, self.layer, -1, Part.WHOLE, start_s, start_s + stalled_s, 0, token)
        del self._arriving[position]
        slot = part.need.slot
        if slot is not None and slot.state is SlotState.ARRIVING and part.start_row == 0:
            self.cache.arrived(slot)
        return part

    def _weights(self, part: _Part) -> Tensor:
        need, geometry, rows = part.need, self.cache.geometry, self.cache.top_rows
        if part.start_row == 0 and need.slot is not None:
            return need.slot.weights
        assert need.staged is not None
        stop_row = rows if part.start_row == 0 and rows > 0 else geometry.neurons
        return rows_of(need.staged.buffer, geometry, self.residency.dtype, part.start_row, stop_row)

    def _computed(self, piece: Piece, start_s: float) -> None:
        """The caller came back for the next piece: it computed `piece` from `start_s` until now."""
        if self.residency.precise:
            self.residency.transfer.fence().wait()
        now_s, num_rows = time.perf_counter(), piece.weights.shape[0]
        part = Part.TOP if piece.start_row == 0 else Part.BOTTOM
        if num_rows == self.cache.geometry.neurons:
            part = Part.WHOLE
        self.residency.telemetry.event(
            EventKind.COMPUTE, self.layer, piece.expert, part, start_s, now_s, 0, self.residency.token
        )

    def _finish(self, need: _Need) -> None:
        """The expert is computed: its slot may be evicted again, its buffer serves the next."""
        residency = self.residency
        del self.open[need.expert]
        fence = residency.transfer.fence()
        if need.slot is not None:
            self.cache.release(need.slot, fence)
        if need.staged is not None:
            if need.slot is None and need.staged.top is not None:
                self._admit(need.staged)
                fence = residency.transfer.fence()
            if need.was_guess:
                residency.count_prefetched(EventKind.USED, need.staged)
            residency.staging.give_back(need.staged, fence)
        if self._waiting and residency.staging.free:
            waiting = self._waiting.popleft()
            self._stage(waiting, with_top=waiting.slot is None and self.cache.top_rows > 0)
        elif not self._waiting:
            residency.place_wishes()

    def _admit(self, staged: StagingBuffer) -> None:
        """Copies a newcomer's top from staging into a slot, on the device, if the policy gives it one."""
        slot = self.residency.room_for_top(self.layer, staged.expert, self._protected)
        if slot is not None:
            slot.buffer.copy_(staged.buffer[: slot.buffer.numel()])
            self.cache.arrived(slot)
            self.cache.release(slot, self.residency.transfer.fence())

    def _abandon_all(self) -> None:
        for need in list(self.open.values()):
            self._abandon(need)

    def _abandon(self, need: _Need) -> None:
        residency = self.residency
        del self.open[need.expert]
        fence = residency.transfer.fence()
        if need.slot is not None and need.slot.state is SlotState.ARRIVING:
            assert need.top_ticket is not None
            residency.transfer.cancel(need.top_ticket)
            need.top_ticket.settle()
            self.cache.forget(need.slot)
        elif need.slot is not None:
            self.cache.release(need.slot, fence)
        if need.staged is not None:
            for ticket in need.staged.tickets():
                residency.transfer.cancel(ticket)
            residency.staging.give_back(need.staged, fence)
