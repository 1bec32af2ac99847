"""The link of a simulated machine: one server, transfers in chunks, two priorities, in closed form.

`simulator` submits what the engine would submit to a `Transfer`, and gets the instant at which it will have landed. The
order of service is `transfer.ledger`'s: demands first come first served, then guesses; a demand waits for the chunk
under way and for no other; a promoted guess joins the end of the demands; what is queued of a cancelled one never
travels. A test compares both, chunk by chunk. Demands are never cancelled, so whatever serves them is known when they
come, and guesses are only looked at when something happens: the cost does not depend on the number of chunks.
All times are seconds of one simulated clock, which its caller keeps and never turns back.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

from .costs import Costs
from .trace import Part


class Run(NamedTuple):
    """Consecutive chunks of one transfer, served without a break at one priority; perhaps not all of these."""

    layer: int
    expert: int
    part: Part
    demand: bool
    nbytes: int
    start_s: float
    end_s: float


class Ticket:
    """One transfer."""

    __slots__ = ("expert", "layer", "nbytes", "part", "submitted_s", "taken_bytes", "taken_s")

    def __init__(self, layer: int, expert: int, part: Part, nbytes: int, submitted_s: float) -> None:
        self.layer = layer
        self.expert = expert
        self.part = part
        self.nbytes = nbytes
        self.submitted_s = submitted_s
        self.taken_bytes = 0  # of chunks that have landed, are under way, or are sure to follow
        self.taken_s = -inf  # when the last of these lands

    @property
    def landed_s(self) -> float:
        """When all of it has landed, as far as that is sure; infinity while chunks of a guess are queued."""
        return self.taken_s if self.taken_bytes == self.nbytes else inf


class SimulatedLink:
    """A chunk that could start at the very instant of a call has started."""

    def __init__(self, costs: Costs, with_runs: bool) -> None:
        self.free_s = 0.0  # when the chunk under way and all demands are through
        self.forget_counts()
        self._bytes_per_s = costs.link_bytes_per_s
        self._latency_s = costs.link_latency_s
        self._chunk_bytes = costs.chunk_bytes
        self._runs: list[Run] | None = [] if with_runs else None
        self._guesses: deque[Ticket] = deque()  # not all taken; first served first

    def forget_counts(self) -> None:
        """Counts start anew, for what starts to travel from now on."""
        self.busy_s = 0.0
        self.demand_bytes = self.prefetch_bytes = 0

    def drain_runs(self) -> list[Run]:
        """The runs since the last call; those of demands may lie ahead."""
        assert self._runs is not None, "runs are not kept"
        runs, self._runs = self._runs, []
        return runs

    def seconds(self, nbytes: int) -> float:
        """What a transfer of so many bytes takes once it is its turn."""
        return self._latency_s + nbytes / self._bytes_per_s

    def demand(self, layer: int, expert: int, part: Part, nbytes: int, now_s: float) -> Ticket:
        """Submits a transfer that is needed now."""
        self.advance(now_s)
        ticket = Ticket(layer, expert, part, nbytes, now_s)
        self._serve(ticket, max(self.free_s, now_s), nbytes, demand=True)
        return ticket

    def prefetch(self, layer: int, expert: int, part: Part, nbytes: int, now_s: float) -> Ticket:
        """Submits a transfer that never delays a demand, but for its chunk under way."""
        self.advance(now_s)
        ticket = Ticket(layer, expert, part, nbytes, now_s)
        self._guesses.append(ticket)
        return ticket

    def promote(self, ticket: Ticket, now_s: float) -> None:
        """The guess came true: what is queued of it is a demand from now on."""
        self.advance(now_s)
        if ticket.taken_bytes < ticket.nbytes:
            self._guesses.remove(ticket)
            self._serve(ticket, max(self.free_s, now_s), ticket.nbytes - ticket.taken_bytes, demand=True)

    def cancel(self, ticket: Ticket, now_s: float) -> None:
        """The guess was wrong: what is queued of it never travels. Its buffer is quiet from `taken_s` on."""
        self.advance(now_s)
        if ticket.taken_bytes < ticket.nbytes:
            self._guesses.remove(ticket)

    def advance(self, now_s: float) -> None:
        """Starts the chunks of guesses whose turn has come by `now_s`."""
        while self._guesses:
            ticket = self._guesses[0]
            start_s = max(self.free_s, ticket.submitted_s)
            if start_s > now_s:
                return
            nbytes = ticket.nbytes - ticket.taken_bytes
            flow_s = start_s if ticket.taken_bytes else start_s + self._latency_s  # when the first byte flows
            if flow_s + nbytes / self._bytes_per_s > now_s:
                flown_s = now_s - flow_s
                num_begun = 1 + int(flown_s * self._bytes_per_s / self._chunk_bytes) if flown_s > 0 else 1
                nbytes = min(nbytes, num_begun * self._chunk_bytes)
            self._serve(ticket, start_s, nbytes, demand=False)
            if ticket.taken_bytes == ticket.nbytes:
                self._guesses.popleft()

    def check(self) -> None:
        """Raise AssertionError if a queued guess has nothing left to travel, or stands behind one that came later."""
        for ticket in self._guesses:
            assert ticket.taken_bytes < ticket.nbytes, (ticket.layer, ticket.expert, ticket.taken_bytes, ticket.nbytes)
        submitted = [ticket.submitted_s for ticket in self._guesses]
        assert submitted == sorted(submitted), submitted

    def _serve(self, ticket: Ticket, start_s: float, nbytes: int, demand: bool) -> None:
        latency_s = 0.0 if ticket.taken_bytes else self._latency_s
        end_s = start_s + latency_s + nbytes / self._bytes_per_s
        ticket.taken_bytes += nbytes
        ticket.taken_s = self.free_s = end_s
        self.busy_s += end_s - start_s
        if demand:
            self.demand_bytes += nbytes
        else:
            self.prefetch_bytes += nbytes
        if self._runs is not None:
            self._runs.append(Run(ticket.layer, ticket.expert, ticket.part, demand, nbytes, start_s, end_s))
