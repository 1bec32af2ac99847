"""What recorded events say of decoding: which part of a step's time went where, and how transfers travelled.

`cost_fit` and `drift` ask for it. Events are those of telemetry, of tokens that were really made. Fits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trace import EventKind, Part, TracePhase


@dataclass(frozen=True, eq=False)
class Run:
    """Decoded tokens under one setting."""

    events: NDArray[np.void]  # rows of EVENT
    top_rows: tuple[int, ...]  # per layer
    guessing: bool  # the next layer's router was asked ahead of time
    scores: NDArray[np.int64] | None = None  # [2, layers, ranks], right guesses and all; None: nobody counted


class Steps:
    """The steps of one run, by token and layer."""

    def __init__(self, run: Run, neurons: Sequence[int]) -> None:
        events = run.events[run.events["phase"] == TracePhase.DECODE]
        self.guessing = run.guessing
        self.neurons, self.top_rows = neurons, run.top_rows
        self.num_layers = len(neurons)
        self.steps = events[events["kind"] == EventKind.STEP]
        self.ends = np.sort(events["end_s"][events["kind"] == EventKind.TOKEN])
        self.compute = events[events["kind"] == EventKind.COMPUTE]
        self.busy = events[np.isin(events["kind"], (EventKind.COMPUTE, EventKind.STALL, EventKind.ADMIT))]
        moved = np.sort(events[np.isin(events["kind"], (EventKind.DEMAND, EventKind.PREFETCH))], order="start_s")
        self.link_shares = link_shares(self.compute, moved)
        self.link_s = [busy_times(moved[moved["layer"] == layer])[1][-1] for layer in range(self.num_layers)]
        self.moved = moved[begins(moved)]

    def segments(self, layer: int) -> NDArray[np.float64]:
        """`[segments, 3]`: of each that `layer` computed, rows beside a busy link, all rows, seconds.

        How much of the time the link was busy is told in quarters, so that medians can be taken.
        """
        mine = self.compute["layer"] == layer
        work, beside = self.compute[mine], np.round(4 * self.link_shares[mine]) / 4
        rows = np.zeros(len(Part))
        rows[[Part.WHOLE, Part.TOP, Part.BOTTOM]] = self.neurons[layer], self.top_rows[layer], self.neurons[layer]
        rows[Part.BOTTOM] -= self.top_rows[layer]
        return np.column_stack((beside * rows[work["part"]], rows[work["part"]], work["end_s"] - work["start_s"]))

    def beside(self, layer: int) -> NDArray[np.float64]:
        """`[steps, 4]`: whether it guessed, how many transfers it handed over and segments it computed, its seconds
        without computing, stalling and admitting.
        """
        steps = self.steps[self.steps["layer"] == layer]
        busy = self.busy[self.busy["layer"] == layer]
        handed = self._handed(layer, steps)
        rows = []
        for step, transfers in zip(steps, handed, strict=True):
            mine = busy[busy["token"] == step["token"]]
            segments = np.count_nonzero(mine["kind"] == EventKind.COMPUTE)
            rows.append((self.guessing, transfers, segments, step["end_s"] - step["start_s"] - length(mine)))
        return np.array(rows, np.float64).reshape(-1, 4)

    def _handed(self, layer: int, steps: NDArray[np.void]) -> NDArray[np.int64]:
        """`[steps]`: demands of `layer` and guesses for the next one, which travelled since the step began and before
        its successor did.
        """
        kind, of = self.moved["kind"], self.moved["layer"]
        demands, guesses = kind == EventKind.DEMAND, kind == EventKind.PREFETCH
        mine = demands & (of == layer) | guesses & (of == (layer + 1) % self.num_layers)
        places = np.searchsorted(steps["start_s"], self.moved["start_s"][mine], side="right") - 1
        return np.bincount(places[places >= 0], minlength=len(steps))

    def before(self, layer: int) -> NDArray[np.float64]:
        """Per step of `layer`: seconds since the layer before it ended, or since the last token was out."""
        steps = self.steps[self.steps["layer"] == layer]
        if layer:
            earlier = self.steps[self.steps["layer"] == layer - 1]
            _, mine, theirs = np.intersect1d(steps["token"], earlier["token"], return_indices=True)
            return np.asarray(steps["start_s"][mine] - earlier["end_s"][theirs], np.float64)
        places = np.searchsorted(self.ends, steps["start_s"], side="right") - 1
        return np.asarray((steps["start_s"] - self.ends[places])[places >= 0], np.float64)

    def after(self) -> NDArray[np.float64]:
        """Per token: seconds from its last layer's end until it was out."""
        last = self.steps[self.steps["layer"] == self.num_layers - 1]
        places = np.searchsorted(self.ends, last["end_s"], side="left")
        known = places < len(self.ends)
        return np.asarray(self.ends[places[known]] - last["end_s"][known], np.float64)


def begins(moved: NDArray[np.void]) -> NDArray[np.bool_]:
    """`[rows]`: whether a row of DEMAND or PREFETCH is a transfer's first. A guess that was promoted on its way counts
    as two, because its parts are served apart.
    """
    keys = [moved[name].astype(np.int64) for name in ("kind", "token", "layer", "expert", "part")]
    begins = np.zeros(len(moved), bool)
    begins[np.unique(np.stack(keys), axis=1, return_index=True)[1]] = True
    return begins


def link_shares(computed: NDArray[np.void], moved: NDArray[np.void]) -> NDArray[np.float64]:
    """`[computed]`: 0..1, during how much of each event one of `moved`, sorted by their start, was under way."""
    times_s, busy_s = busy_times(moved)
    start_s, end_s = computed["start_s"], computed["end_s"]
    spent_s = np.interp(end_s, times_s, busy_s) - np.interp(start_s, times_s, busy_s)
    shares = np.zeros(len(computed))
    np.divide(spent_s, end_s - start_s, out=shares, where=end_s > start_s)
    return shares


def busy_times(moved: NDArray[np.void]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Instants at which the link took up work and ran out of it, in turn, with `moved` sorted by their start; and
    its busy seconds up to each.
    """
    ends_s = np.maximum.accumulate(moved["end_s"])
    starts_s = np.maximum(moved["start_s"], np.concatenate(([-np.inf], ends_s[:-1]))[: len(moved)])
    times_s = np.concatenate(([0.0], np.column_stack((starts_s, np.maximum(starts_s, ends_s))).ravel()))
    return times_s, np.concatenate(([0.0], np.cumsum(np.diff(times_s) * (np.arange(len(times_s) - 1) % 2))))


def bursts(events: NDArray[np.void]) -> NDArray[np.float64]:
    """`[bursts, 3]`: transfers, bytes and busy seconds of the demands, and of the guesses, for each layer and token."""
    moved = events[np.isin(events["kind"], (EventKind.DEMAND, EventKind.PREFETCH))]
    moved = moved[moved["phase"] == TracePhase.DECODE]
    if not len(moved):
        return np.zeros((0, 3))
    keys = [moved[name].astype(np.int64) for name in ("kind", "token", "layer")]
    _, place = np.unique(np.stack(keys), axis=1, return_inverse=True)
    order = np.lexsort((moved["start_s"], place.ravel()))
    moved, place = moved[order], place.ravel()[order]
    transfers = np.unique(np.stack((place, moved["expert"], moved["part"])), axis=1)[0]
    # Bursts are moved apart, so that one pass unites the intervals of each.
    first_s = moved["start_s"].min()
    apart_s = place * (moved["end_s"].max() - first_s + 1.0) - first_s
    starts_s, ends_s = moved["start_s"] + apart_s, moved["end_s"] + apart_s
    seen_s = np.maximum.accumulate(np.concatenate(([-np.inf], ends_s[:-1])))
    busy_s = np.maximum(0.0, ends_s - np.maximum(starts_s, seen_s))
    return np.column_stack([np.bincount(transfers), np.bincount(place, moved["nbytes"]), np.bincount(place, busy_s)])


def length(events: NDArray[np.void]) -> float:
    return float((events["end_s"] - events["start_s"]).sum())
