"""From recorded events to `Costs`: what a decode step cost on this machine, fitted to tokens that were really made.

`calibration` makes tokens under a few settings and hands their events over; nothing is measured by a stand-in, so
times hold under the contention that serving has. Medians, because machines are shared. All formulas are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .costs import Costs, LayerCosts, LinkSpeed
from .guesses import accuracies
from .recordings import Run, Steps, begins, bursts
from .trace import EventKind, TracePhase

_SETTLED = 0.1  # of the copies into slots: the first one into fresh memory takes five times as long, but only once
_CLEARLY = 0.1  # of the squares, that a lower rate of the link must explain


def fit_costs(
    runs: Sequence[Run],
    neurons: Sequence[int],
    chunk_bytes: int,
    link_alone: LinkSpeed,
) -> Costs:
    """`neurons` per layer. The link is what it was in the runs, or alone when nothing travelled in them.

    A step's time is stall + step_s + (guess_s) + transfers · transfer_s + Σ over segments of (segment_s + row_s · rows)
    + drag · link seconds + admissions. What segments take, with the link idle and busy, is fitted to the compute events
    of all layers of one size, what the step takes beside to the remainders of its time.
    """
    found = [Steps(run, neurons) for run in runs]
    admit_s = _admit_s_per_byte(runs, link_alone)
    shared = {size: _shared(found, neurons, size, admit_s) for size in set(neurons)}
    layers = [
        replace(shared[size], before_s=_median([steps.before(layer) for steps in found]))
        for layer, size in enumerate(neurons)
    ]
    after_s = _median([steps.after() for steps in found])
    bytes_per_s, latency_s = _link(runs, link_alone)
    costs = Costs(tuple(layers), after_s, bytes_per_s, latency_s, chunk_bytes, "measured", alone=link_alone)
    scores = [run.scores for run in runs if run.scores is not None]
    if scores:
        costs = replace(costs, guess_accuracy=accuracies(*np.sum(scores, axis=0)))
    factors = np.concatenate([computing(run, neurons, costs) for run in runs])
    return replace(costs, error=float(np.median(np.abs(1 / factors - 1))) if len(factors) else 0.0)


def computing(run: Run, neurons: Sequence[int], costs: Costs) -> NDArray[np.float64]:
    """`[tokens]`: how many times as long as `costs` say each token of `run` was computed with, stalls left out."""
    events = run.events[run.events["phase"] == TracePhase.DECODE]
    made = events[events["kind"] == EventKind.TOKEN]
    made = made[np.argsort(made["token"])]
    tokens, layers = made["token"], costs.layers

    def sums(kind: EventKind, values: Callable[[NDArray[np.void]], NDArray[np.float64]]) -> NDArray[np.float64]:
        rows = events[(events["kind"] == kind) & np.isin(events["token"], tokens)]
        places = np.searchsorted(tokens, rows["token"])
        return np.bincount(places, values(rows), minlength=len(tokens)).astype(np.float64)

    def of_layer(name: str, rows: NDArray[np.void]) -> NDArray[np.float64]:
        return np.asarray(np.array([getattr(layer, name) for layer in layers])[rows["layer"]])

    def segments_s(rows: NDArray[np.void]) -> NDArray[np.float64]:
        tops = np.array(run.top_rows)
        lengths = np.stack((np.array(neurons), tops, np.array(neurons) - tops))  # in the order of Part
        return np.asarray(of_layer("segment_s", rows) + of_layer("row_s", rows) * lengths[rows["part"], rows["layer"]])

    def transfers_s(rows: NDArray[np.void]) -> NDArray[np.float64]:
        link_s = rows["nbytes"] / costs.link_bytes_per_s + costs.link_latency_s * begins(rows)
        return np.asarray(of_layer("transfer_s", rows) * begins(rows) + of_layer("drag", rows) * link_s)

    beside_s = costs.after_s + sum(each.before_s + each.step_s + run.guessing * each.guess_s for each in layers)
    expected_s = beside_s + sums(EventKind.COMPUTE, segments_s)
    expected_s += sums(EventKind.DEMAND, transfers_s) + sums(EventKind.PREFETCH, transfers_s)
    expected_s += sums(EventKind.ADMIT, lambda rows: of_layer("admit_s", rows) * rows["nbytes"])
    whole = sums(EventKind.STEP, lambda rows: np.ones(len(rows))) == len(layers)  # nothing of the token was lost
    took_s = made["end_s"] - made["start_s"] - sums(EventKind.STALL, lambda rows: rows["end_s"] - rows["start_s"])
    return np.asarray((took_s / expected_s)[whole & (expected_s > 0)])


def _shared(found: Sequence[Steps], neurons: Sequence[int], size: int, admit_s: float) -> LayerCosts:
    """What all layers of `size` neurons have in common; `before_s` is left at 0."""
    layers = [layer for layer, own in enumerate(neurons) if own == size]
    parts = np.concatenate([steps.segments(layer) for steps in found for layer in layers])
    base_s, more_s, row_s = _fit(parts[:, :2], parts[:, 2])
    beside = np.concatenate([steps.beside(layer) for steps in found for layer in layers])
    step_s, guess_s, transfer_s, per_segment_s = _fit(beside[:, :3], beside[:, 3])
    lost_s, link_s = more_s * parts[:, 0].sum(), sum(steps.link_s[layer] for steps in found for layer in layers)
    drag = float(lost_s / link_s) if link_s else 0.0
    return LayerCosts(0.0, step_s, guess_s, base_s + per_segment_s, row_s, admit_s, transfer_s, drag)


def _admit_s_per_byte(runs: Sequence[Run], alone: LinkSpeed) -> float:
    """What copies into slots took, or such a copy alone where nothing was admitted."""
    admits = np.concatenate([run.events[run.events["kind"] == EventKind.ADMIT] for run in runs])
    if not len(admits):
        return alone.copy_s_per_byte
    return float(np.quantile((admits["end_s"] - admits["start_s"]) / admits["nbytes"], _SETTLED))


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], worth: float = 1e-3) -> list[float]:
    """y ≈ a + x·b, none below zero: least squares over the median of y at each distinct x, so outliers weigh little.

    Of all choices of columns the one with the least squares; more or earlier columns have to lower them by `worth`.
    Columns of x that do not vary explain nothing and get 0, but for the last: without any a, all is put on it.
    """
    if not len(y):
        return [0.0] * (x.shape[1] + 1)
    points, places, counts = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    medians = np.array([np.median(y[places.ravel() == place]) for place in range(len(points))])
    if len(points) == 1:
        last = points[0, -1]
        return [0.0] * x.shape[1] + [float(medians[0] / last) if last else 0.0]
    design = np.column_stack((np.ones(len(points)), points)) * np.sqrt(counts)[:, None]
    wanted = medians * np.sqrt(counts)
    columns = [*(1 + np.flatnonzero(np.ptp(points, axis=0)))[::-1], 0]
    answer, least = np.zeros(design.shape[1]), float(wanted @ wanted)
    rounding = 1e-12 * least
    for number in range(1, len(columns) + 1):
        for chosen in map(list, combinations(columns, number)):
            values, _, rank, _ = np.linalg.lstsq(design[:, chosen], wanted, rcond=None)
            squares = float(np.square(design[:, chosen] @ values - wanted).sum())
            if rank == number and (values >= 0).all() and squares < (1 - worth) * least - rounding:
                answer, least = np.zeros(design.shape[1]), squares
                answer[chosen] = values
    return [float(value) for value in answer]


def _link(runs: Sequence[Run], alone: LinkSpeed) -> tuple[float, float]:
    """Bytes per second and latency of a transfer beside compute: busy time = transfers · latency + bytes / rate, fitted
    to what travelled for one layer of one token.

    Where experts are small or of one size, rate and latency look alike. So bytes take what they take alone (no more
    than was seen), what is left is latency, and the rate is lower only if that explains the runs clearly better.
    """
    moved = np.concatenate([bursts(run.events) for run in runs])
    if not len(moved):
        return alone.bytes_per_s, alone.latency_s
    transfers, nbytes, seconds = moved.T
    alone_s = min(1 / alone.bytes_per_s, float(np.median(seconds / nbytes)))
    base_s, more_s, latency_s = _fit(np.column_stack((nbytes, transfers)), seconds - alone_s * nbytes, _CLEARLY)
    return 1 / (alone_s + more_s), latency_s + base_s / float(transfers.mean())


def _median(values: Sequence[NDArray[np.float64]]) -> float:
    together = np.concatenate(values)
    return float(np.median(together)) if len(together) else 0.0
