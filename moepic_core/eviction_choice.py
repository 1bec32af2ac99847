"""Which eviction policy suits the routing at hand: decided by what each would have hit, not by name (ours).

Long memory wins where experts are used about evenly and hot ones stay hot, recency where neighbouring tokens share
experts (docs/RESULTS.md, "LCP examined"). `planner` asks when neither strategy nor user has named a policy. Pure.
"""

from __future__ import annotations

import numpy as np

from .hit_curves import hit_curve, ranks
from .routing import RoutingTrace
from .spec import EvictionName

CANDIDATES: tuple[EvictionName, ...] = ("lcp-aged", "lru")  # the first one unless another is better by MARGIN
MARGIN = 0.001  # of all uses: less is noise
_TOKENS, _LAYERS = 1024, 8  # that are looked at: a third of a second's work for the largest models


def mean_hits(eviction: EvictionName, trace: RoutingTrace) -> float:
    """Share of uses that hit, mean over all cache sizes from one expert to all but one, and over layers."""
    found = ranks(eviction, trace).experts
    curves = [hit_curve(found[:, layer], count)[1:count] for layer, count in enumerate(trace.num_experts)]
    return float(np.mean([curve.mean() for curve in curves if len(curve)] or [0.0]))


def best_eviction(trace: RoutingTrace) -> tuple[EvictionName, float]:
    """The policy with the most hits on recent tokens of `trace`, and how many more of all uses than the first one's."""
    layers = np.unique(np.linspace(0, len(trace.num_experts) - 1, _LAYERS).astype(int))
    recent = trace.last(_TOKENS).of_layers(layers.tolist())
    default, *others = ((mean_hits(name, recent), name) for name in CANDIDATES)
    hits, name = max(others)
    gain = hits - default[0]
    return (name, gain) if gain > MARGIN else (default[1], 0.0)
