"""What the next router would have guessed where a trace does not say: the accuracy of guesses, and made-up ones.

A layer that is wholly resident is not asked to guess, and neither is any without prefetch, so the routing of such a
session tells nothing about guesses that another plan would make. `completed` fills these gaps with guesses that are as
often right as recorded ones of the same layer, else as those of calibration's rehearsals, else as assumed; and says
which. Cost model and simulator read completed traces. Pure, and the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .routing import RoutingTrace

ASSUMED_ACCURACY = 0.5
AT_CALIBRATION, ASSUMED = "measured at calibration", "assumed"  # for people
FEWEST = 32  # recorded guesses of a layer's first rank below which they say too little

Accuracies = Sequence[Sequence[float]]  # [layers][ranks], 0..1; a layer without any was not measured
Ids = NDArray[np.int16]


def accuracies(right: NDArray[np.int64], total: NDArray[np.int64]) -> tuple[tuple[float, ...], ...]:
    """Of right and all guesses, both [layers, ranks]; only ranks that were guessed at all, by Laplace's rule as in
    `predictor`.
    """
    return tuple(
        tuple(((own_right + 1) / (own + 2))[own > 0].tolist()) for own_right, own in zip(right, total, strict=True)
    )


def completed(trace: RoutingTrace, measured: Accuracies = ()) -> tuple[RoutingTrace, str]:
    """`trace` with guesses for every layer of every token, but for the first layer of a reply, which nobody asks; and
    for people how many are right, and how that is known. The same object where nothing was missing.

    `measured` is the accuracy found by rehearsals, one entry per layer, or () for none.
    """
    missing = np.logical_and((trace.experts >= 0).any(axis=2), ~(trace.guesses >= 0).any(axis=2))
    missing[np.flatnonzero(np.diff(trace.replies, prepend=-1)), 0] = False
    total, num_right = float((trace.guesses >= 0).sum()), float(_is_right(trace).sum())
    origins = [trace.source] if total else []
    if missing.any():
        known, reasons = _known(trace, measured)
        told = {reasons[layer] for layer in np.flatnonzero(missing.any(axis=0))}
        origins += [reason for reason in (AT_CALIBRATION, ASSUMED) if reason in told]
        filled = (trace.experts >= 0) & missing[..., None]
        total, num_right = total + filled.sum(), num_right + float((filled.sum(axis=0) * known).sum())
        trace = _filled(trace, missing, known)
    return trace, f"{num_right / total:.0%} of guesses right ({', '.join(origins)})" if total else ""


def _is_right(trace: RoutingTrace) -> NDArray[np.bool_]:
    """[tokens, layers, depth]"""
    right = np.zeros(trace.guesses.shape, np.bool_)
    for column in range(trace.experts.shape[2]):
        right |= trace.guesses == trace.experts[..., column, None]
    return right & (trace.guesses >= 0)


def _known(trace: RoutingTrace, measured: Accuracies) -> tuple[NDArray[np.float64], list[str]]:
    """The accuracy of each layer and rank [layers, k], and for each layer how it is known."""
    top_k = trace.experts.shape[2]
    total = (trace.guesses >= 0).sum(axis=0)
    recorded = accuracies(_is_right(trace).sum(axis=0), total)
    known, reasons = np.empty((len(trace.num_experts), top_k)), []
    for layer, own in enumerate(recorded):
        reason = trace.source
        if total[layer].max(initial=0) < FEWEST:
            own, reason = (tuple(measured[layer]) if measured else ()), AT_CALIBRATION
        if not own:
            own, reason = (ASSUMED_ACCURACY,), ASSUMED
        reasons.append(reason)
        known[layer] = [own[min(rank, len(own) - 1)] for rank in range(top_k)]
    return known, reasons


def _filled(trace: RoutingTrace, missing: NDArray[np.bool_], known: NDArray[np.float64]) -> RoutingTrace:
    """For each used expert a guess where guesses are `missing` [tokens, layers]: itself, as often as guesses of its
    rank are right, or another one that the token does not use.
    """
    generator = np.random.default_rng(0)
    tokens, layers = np.nonzero(missing)
    used = trace.experts[tokens, layers]  # [rows, k]
    others = _unused(used, np.array(trace.num_experts)[layers], generator)
    right = generator.random(used.shape) < known[layers]
    top_k, depth = used.shape[1], trace.guesses.shape[2]
    guesses = np.pad(trace.guesses, ((0, 0), (0, 0), (0, max(0, top_k - depth))), constant_values=-1)
    guesses[tokens, layers, :top_k] = np.where(used < 0, -1, np.where(right, used, others))
    return replace(trace, guesses=guesses)


def _unused(used: Ids, num_experts: NDArray[np.int64], generator: np.random.Generator) -> Ids:
    """As many experts again as each row of `used` [rows, k] has room for that it does not use; -1 when they run out.

    The first unused ones from a random expert on: any is equally likely, none comes twice.
    """
    count, top_k = num_experts[:, None], used.shape[1]
    place = np.arange(2 * top_k)
    others = (generator.integers(0, num_experts)[:, None] + place) % count
    free = place < count
    for column in range(top_k):
        free &= others != used[:, column, None]
    first = (~free).argsort(axis=1, kind="stable")[:, :top_k]
    chosen = np.where(np.take_along_axis(free, first, 1), np.take_along_axis(others, first, 1), -1)
    return np.asarray(chosen, np.int16)
