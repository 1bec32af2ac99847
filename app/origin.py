"""Where the routing comes from that predictions stand on, in words: made here, or brought along by the checkpoint.

A checkpoint may come with recorded routing, which counts until enough tokens were made here; then it is forgotten.
"""

from __future__ import annotations

import numpy as np

from moepic_core.routing import UNKNOWN, RoutingTrace


def origin(trace: RoutingTrace | None) -> str:
    """Of which tokens `trace` is; None is the routing that is assumed while nothing is known."""
    if trace is None:
        return "assumed routing, until some tokens were made here"
    names = trace.subject_names
    own = int(np.sum(trace.subjects == names.index(UNKNOWN))) if UNKNOWN in names else 0
    brought = trace.num_tokens - own
    if not brought:
        return f"{own:,} tokens made on this machine"
    came = f"{brought:,} tokens that came with the checkpoint"
    return f"{came} and {own:,} made on this machine" if own else came
