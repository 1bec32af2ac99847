"""One MoE layer of one pass: what the residency lacks is demanded at once, and computed in the order of readiness.

`hf.experts` opens a `Step` per layer and computes the pieces that it hands out: resident segments first, then each
arriving one as its tickets complete. Slots, buffers, policies and counters are the residency's; the step knows which of
them serve which expert, and gives all back whatever happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from types import TracebackType

from .device_cache import Slot, SlotState
from .errors import Cancelled
from .packing import rows_of
from .pieces import Need, Pending, Piece, PieceQueue
from .residency import Residency
from .staging import StagingBuffer
from .trace import EventKind, Outcome, Part
from .transfer.base import Priority


class Step:
    """A context manager that iterates over the layer's pieces."""

    def __init__(self, residency: Residency, layer: int, counts: Mapping[int, int]) -> None:
        """`counts` are the experts that the layer needs, each with the number of tokens routed to it."""
        self.residency = residency
        self.layer = layer
        self.cache = residency.caches[layer]
        self.open: dict[int, Need] = {}
        self._whole: list[Slot] | None = None  # of all needed experts, when nothing has to be brought
        self._bounds_s: list[float] = []  # between the computations from them
        self._protected: Collection[int] = counts if residency.decode else self.open
        self._pending = PieceQueue()
        self._waiting: deque[Need] = deque()  # for a staging buffer
        self._counts = counts
        self._start_s = time.perf_counter()

    def __enter__(self) -> Step:
        if self.residency.cancelled():
            raise Cancelled("stopped by the user")
        try:
            self._begin(self._counts)
        except BaseException:
            self._abandon_all()
            raise
        return self

    def __iter__(self) -> Iterator[Piece]:
        if self._whole is not None:
            self.residency.transfer.start()
            self._bounds_s.append(time.perf_counter())
            for slot in self._whole:
                yield Piece(slot.expert, 0, slot.weights)
                self._bounds_s.append(self._computed_s())
        while self._pending:
            need, piece = self._next()
            self.residency.transfer.start()
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
        if self._whole is not None:
            assert kind is not None or len(self._bounds_s) > len(self._whole), (len(self._bounds_s), len(self._whole))
            self._finish_whole()
        if self._pending.waited:
            self.residency.loads.report_stalls(telemetry, token)
        telemetry.event(EventKind.STEP, self.layer, -1, Part.WHOLE, self._start_s, time.perf_counter(), 0, token)

    def _begin(self, counts: Mapping[int, int]) -> None:
        residency, layer = self.residency, self.layer
        residency.wishes.clear()  # this layer is here: what was wished for it is demanded now or was wrong
        policy = residency.policies[layer]
        for expert, count in counts.items():
            policy.touch(expert, residency.token, count)
        self._whole = self.cache.whole(counts)
        whole = self._whole is not None
        for guessed_layer, expert in list(residency.staging.guesses):
            if guessed_layer == layer and (expert not in counts or whole):
                residency.drop_guess(residency.staging.guesses[layer, expert])
        guesses = residency.predictor.observe(layer, counts) if residency.decode else ()
        if residency.matrices is not None and residency.decode:
            residency.matrices.observe(layer, counts)
        outcomes = [Outcome.HIT if whole else self._classify(expert) for expert in counts]
        residency.telemetry.layer_step(layer, residency.token, list(counts), outcomes, list(counts.values()), guesses)
        for need in list(self.open.values()):
            self._demand(need)

    def _classify(self, expert: int) -> Outcome:
        """Registers the need, takes what is already on the device, and says how much that is."""
        staging, cache = self.residency.staging, self.cache
        need = self.open[expert] = Need(expert)
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

    def _demand(self, need: Need) -> None:
        """Starts what is missing, tops first, and queues the need's pieces."""
        residency, rows, whole = self.residency, self.cache.top_rows, self.cache.geometry.neurons
        top_missing = rows > 0 and need.slot is None and (need.staged is None or need.staged.top is None)
        assert not (top_missing and need.staged), f"a guess of expert {need.expert} lacks its top"
        if top_missing and residency.decode:
            need.slot = residency.room_for_top(self.layer, need.expert, self._protected)
            if need.slot is not None:
                need.top_ticket = residency.loads.into_slot(self.layer, need.slot)
                top_missing = False
        if need.slot is not None:
            self._pending.add(Pending(need, 0, () if need.top_ticket is None else (need.top_ticket,)))
        if need.staged is not None:
            self._queue_staged(need)
        elif top_missing or rows < whole:
            self._stage(need, with_top=top_missing)

    def _stage(self, need: Need, with_top: bool) -> None:
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
        self.residency.loads.into_staging(need.staged, Priority.DEMAND, with_top)
        self._queue_staged(need)

    def _queue_staged(self, need: Need) -> None:
        assert need.staged is not None
        if need.staged.top is not None and need.slot is None:
            self._pending.add(Pending(need, 0, (need.staged.top,)))
        if self.cache.top_rows < self.cache.geometry.neurons:
            self._pending.add(Pending(need, self.cache.top_rows, need.staged.tickets()))

    def _next(self) -> tuple[Need, Piece]:
        """The next piece whose data is here, and whose it is."""
        residency, geometry, rows = self.residency, self.cache.geometry, self.cache.top_rows
        need, start_row, tickets = self._pending.next(residency.cancelled)
        if tickets and residency.precise:  # else computing would seem to begin while the device still waits
            residency.transfer.fence().wait()
        if start_row == 0 and need.slot is not None:
            if need.slot.state is SlotState.ARRIVING:
                self.cache.arrived(need.slot)
            return need, Piece(need.expert, 0, need.slot.weights)
        assert need.staged is not None
        stop_row = rows if start_row == 0 and rows > 0 else geometry.neurons
        weights = rows_of(need.staged.buffer, geometry, residency.dtype, start_row, stop_row)
        return need, Piece(need.expert, start_row, weights)

    def _computed_s(self) -> float:
        """When the piece that was handed out last had been computed, or was on its way through the device."""
        if self.residency.precise:
            self.residency.transfer.fence().wait()
        return time.perf_counter()

    def _finish_whole(self) -> None:
        """The slots never left `ready`: nobody else can want them while their own layer runs and lacks nothing."""
        assert self._whole is not None
        fence, residency = self.residency.transfer.fence(), self.residency
        for slot in self._whole:
            slot.fence = fence
        experts = [slot.expert for slot in self._whole][: max(0, len(self._bounds_s) - 1)]
        residency.telemetry.computed(self.layer, experts, Part.WHOLE, self._bounds_s, residency.token)

    def _computed(self, piece: Piece, start_s: float) -> None:
        """The caller came back for the next piece: it computed `piece` from `start_s` until now."""
        now_s, num_rows = self._computed_s(), piece.weights.shape[0]
        part = Part.TOP if piece.start_row == 0 else Part.BOTTOM
        if num_rows == self.cache.geometry.neurons:
            part = Part.WHOLE
        self.residency.telemetry.event(
            EventKind.COMPUTE, self.layer, piece.expert, part, start_s, now_s, 0, self.residency.token
        )

    def _finish(self, need: Need) -> None:
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
        """A newcomer's top moves from staging into a slot if the policy gives it one: copied on the device, or where a
        slot holds a whole record, by exchanging the two buffers.
        """
        residency = self.residency
        slot = residency.room_for_top(self.layer, staged.expert, self._protected)
        if slot is None:
            return
        start_s, nbytes = time.perf_counter(), slot.buffer.numel()
        copies = nbytes < staged.buffer.numel()
        if copies:
            slot.buffer.copy_(staged.buffer[:nbytes])
        else:
            staged.buffer = self.cache.exchange(slot, staged.buffer)
        self.cache.arrived(slot)
        self.cache.release(slot, residency.transfer.fence())
        if copies:
            residency.telemetry.event(
                EventKind.ADMIT,
                self.layer,
                staged.expert,
                Part.TOP,
                start_s,
                self._computed_s(),
                nbytes,
                residency.token,
            )

    def _abandon_all(self) -> None:
        for need in list(self.open.values()):
            self._abandon(need)

    def _abandon(self, need: Need) -> None:
        residency = self.residency
        del self.open[need.expert]
        fence = residency.transfer.fence()
        if need.slot is not None and need.slot.state is SlotState.ARRIVING:
            if need.top_ticket is not None:  # None: a link that has failed did not even take it
                residency.transfer.cancel(need.top_ticket)
                need.top_ticket.settle()
            self.cache.forget(need.slot)
        elif need.slot is not None:
            self.cache.release(need.slot, fence)
        if need.staged is not None:
            for ticket in need.staged.tickets():
                residency.transfer.cancel(ticket)
            residency.staging.give_back(need.staged, fence)
