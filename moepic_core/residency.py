"""The heart: brings a layer's experts to where they are computed, and decides what stays.

The only place where cache, host store, transfer, eviction, predictor and telemetry meet. The engine applies plans and
marks passes; within a pass `hf.experts` opens a `Step` for each MoE layer (`step`), which takes its slots and buffers
here, and asks for a prefetch of the next. All state changes happen on the compute thread. Does no arithmetic on weights
and knows no stream, thread or file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from .activation_matrices import ActivationMatrices
from .arena import Arena
from .device_cache import LayerCache, Slot
from .eviction import EvictionPolicy, make_policy
from .geometry import record_stride
from .host_store import HostStore
from .loads import Loads
from .predictor import Predictor
from .routing import RoutingTrace
from .spec import MoeLayer, Plan
from .staging import Staging, StagingBuffer
from .telemetry import Telemetry
from .trace import EventKind, Part
from .transfer.base import Priority, Transfer


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
        self.loads = Loads(store, transfer, self.caches)
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
        self.arena.trim()
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
            self.loads.discard()
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
        """Fills free slots with the tops that the eviction policies rank highest.

        Raises Cancelled and TransferFailed; what had not arrived by then is not cached, and the books balance.
        """
        self.loads.fill([policy.ranking(self.token) for policy in self.policies], self.cancelled)

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

    def end_pass(self) -> int:
        """The pass is over: reports what the link did. Returns the number of the pass's last token."""
        last = self.token + self._pass_tokens - 1
        self.loads.report_stalls(self.telemetry, self.token)
        self.loads.report(self.telemetry, last)
        return last

    def end_reply(self) -> None:
        """A request is over: what was guessed is forgotten, and what a device did after the last pass is reported."""
        self.end_pass()
        self.forget_guesses()

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
            self.loads.into_staging(buffer, Priority.PREFETCH, with_top=not top_cached)

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
