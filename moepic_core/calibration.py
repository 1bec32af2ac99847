"""Measures what a decode step costs in the loaded process, a few seconds long: the `Costs` that planning stands on.

Lets the engine make a handful of tokens under a few settings and fits costs to what was recorded. So nothing is timed
by a stand-in, and transfers compete with compute as they do in a chat. The session's figures do not notice.
"""

from __future__ import annotations

from collections.abc import Callable

from .cost_fit import fit_costs
from .costs import Costs
from .engine import Engine
from .measuring import measure_link, rehearse

# Split ratio, prefetch, share of the experts that may be cached: three lengths of segments, with much traffic and
# little, so that what a transfer costs can be told from what is computed meanwhile.
_REHEARSALS = ((1.0, "off", "33%"), (0.6, "off", "100%"), (1.0, "on", "33%"), (0.6, "on", "100%"))
_SECONDS = 1.2  # for each rehearsal

Progress = Callable[[float], None]  # share done, 0..1


def calibrate(engine: Engine, progress: Progress | None = None) -> Costs:
    """Measures, and has the engine plan with the result. A stop of the engine ends it with Cancelled."""
    tell = progress or (lambda share: None)
    tell(0.0)
    link, runs = measure_link(engine), []
    for number, (split, prefetch, experts) in enumerate(_REHEARSALS):
        tell((1 + number) / (1 + len(_REHEARSALS)))
        runs.append(rehearse(engine, _SECONDS, experts, strategy="moepic", split=split, prefetch=prefetch))
    neurons = [layer.neurons for layer in engine.spec.moe_layers]
    costs = fit_costs(runs, neurons, engine.residency.transfer.chunk_bytes, link)
    engine.learn(costs)
    tell(1.0)
    return costs
