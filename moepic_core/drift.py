"""How far replies are from what was predicted for them, and costs that follow the machine when it has changed.

`steering` asks after every reply, and keeps the answers. A machine may be slower or faster than when it was measured:
other programs, heat, another clock. Then two factors, read off the recorded events of the last replies, bring costs in
line, and no rehearsal is needed. What tokens need other experts for than planned shows in neither. Pure; ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cost_fit import computing
from .costs import Costs, LayerCosts
from .recordings import Run, bursts
from .spec import MoeLayer, Plan
from .trace import EventKind, TracePhase

FEWEST_TOKENS, MOST_TOKENS = 16, 128  # decoded ones of a reply: with fewer it says nothing, the newest ones count
KEPT = 8  # replies
TYPICAL_ERROR = 0.1  # of predictions, before replies were made (docs/RESULTS.md)
COVERED = 0.8  # of the replies lie within the error that is stated
STALE_REPLIES, STALE = 3, 1.25  # costs are stale when the median of so many replies is so many times off
NOTEWORTHY = 1.05  # a factor nearer to 1 is noise


class Drift(NamedTuple):
    """One reply: seconds that were measured over those that were expected."""

    total: float  # of its median token, over what the plan predicted
    compute: float  # of computing, over what costs say of the very same segments
    link: float  # of transfers, over what costs say of the very same bytes; 1 where nothing travelled


def drift_of(
    events: NDArray[np.void], reply: int, plan: Plan, layers: Sequence[MoeLayer], costs: Costs
) -> Drift | None:
    """What recorded `events` say of a reply that was made under `plan`; None when it is too short."""
    events = events[(events["reply"] == reply) & (events["phase"] == TracePhase.DECODE)]
    made = events[events["kind"] == EventKind.TOKEN][-MOST_TOKENS:]
    if len(made) < FEWEST_TOKENS or plan.predicted is None:
        return None
    run = Run(
        events[np.isin(events["token"], made["token"])],
        tuple(share.top_rows for share in plan.layers),
        plan.prefetch_depth > 0,
    )
    computed = computing(run, [layer.neurons for layer in layers], costs)
    if len(computed) < FEWEST_TOKENS:  # the ring has forgotten them
        return None
    num_transfers, nbytes, busy_s = bursts(run.events).T
    moved = busy_s / (num_transfers * costs.link_latency_s + nbytes / costs.link_bytes_per_s)
    return Drift(
        float(np.median(made["end_s"] - made["start_s"])) / plan.predicted.total_s,
        float(np.median(computed)),
        float(np.median(moved)) if len(moved) else 1.0,
    )


def is_stale(drifts: Sequence[Drift]) -> bool:
    """Whether the last replies together were too far from their predictions, in either direction."""
    if len(drifts) < STALE_REPLIES:
        return False
    off = float(np.median([drift.total for drift in drifts[-STALE_REPLIES:]]))
    return max(off, 1 / off) > STALE


def followed(costs: Costs, drifts: Sequence[Drift]) -> Costs:
    """`costs` as the last replies found them; the same object where they differ in nothing that matters."""
    recent = drifts[-STALE_REPLIES:]
    compute, link = (float(np.median([getattr(drift, name) for drift in recent])) for name in ("compute", "link"))
    if max(compute, 1 / compute, link, 1 / link) < NOTEWORTHY:
        return costs
    return replace(
        costs,
        layers=tuple(_times(layer, compute) for layer in costs.layers),
        after_s=costs.after_s * compute,
        link_bytes_per_s=costs.link_bytes_per_s / link,
        link_latency_s=costs.link_latency_s * link,
        note=f"costs follow the last replies: computing took {compute:.2f} and transfers {link:.2f} times as long as "
        "was known before",
    )


def forecast_error(costs: Costs, drifts: Sequence[Drift]) -> float:
    """How far a token's time may be from its prediction, 0..1: as far as COVERED of the kept replies were, or what is
    typical while they are few. Never less than what the fit itself leaves open.
    """
    if len(drifts) < STALE_REPLIES:
        return max(costs.error, TYPICAL_ERROR)
    return min(1.0, max(costs.error, float(np.quantile([abs(1 - 1 / drift.total) for drift in drifts], COVERED))))


def _times(layer: LayerCosts, factor: float) -> LayerCosts:
    """All that is in seconds takes `factor` times as long."""
    return replace(layer, **{name: value * factor for name, value in asdict(layer).items() if name != "drag"})
