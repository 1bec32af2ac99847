"""What the loaded engine can be made to show between replies, without the session noticing.

`calibration` and `comparison` call these, and so do benchmarks. Each takes the engine's turn, records apart from the
session's telemetry or not at all, and puts back what was in force before. Fits and judges nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .budgets import OF_EXPERTS, budget_bytes
from .costs import LinkSpeed
from .engine import Engine
from .link_probe import probe_link
from .recordings import Run
from .routing import RoutingTrace
from .uniform import uniform_plan

_REHEARSAL = "The quick brown fox jumps over the lazy dog, and then it counts: 1, 2, 3, 4, 5."
_FEWEST, _MOST = 3, 48  # tokens of a rehearsal


def measure_link(engine: Engine) -> LinkSpeed:
    """How fast bytes reach the device with nothing else to do. Takes about half a second."""
    with engine.turn.between_replies():
        engine.residency.forget_guesses()
        return probe_link(engine.residency)


def rehearse(engine: Engine, seconds: float, experts: str = "100%", **changes: Any) -> Run:
    """Makes a few tokens under other live settings and returns what was recorded; then all is as before.

    `experts` says how many may be cached, where the budget in force allows as many.

    The session's telemetry, eviction history and predictions do not notice, but the KV memory and what was cached are
    gone. Raises Cancelled after `request_stop`.
    """
    settings = engine.settings.replace(**changes)
    with engine.turn.between_replies():
        engine.turn.stop.clear()
        plan, budget = engine.plan, budget_bytes(f"{experts} {OF_EXPERTS}", engine.needs, 0)
        rehearsed = uniform_plan(settings, engine.needs, min(budget, plan.memory.budget))
        with engine.residency.rehearsal(rehearsed):
            engine.hf.forget()
            telemetry = engine.residency.telemetry
            telemetry.begin_reply(time.perf_counter(), 0, 0)
            ids = engine.encode(_REHEARSAL)[: engine.context_length // 2]
            until_s = time.perf_counter() + seconds
            made = 0
            while made < _FEWEST or (time.perf_counter() < until_s and made < _MOST):
                logits, token = engine.passes.run(ids)
                telemetry.new_token(token, time.perf_counter())
                ids.append(int(logits.argmax()))
                made += 1
            events, _ = telemetry.events()
            scores = np.stack(engine.residency.predictor.counts())
            engine.hf.forget()
        engine.governor.apply(plan)
        engine.residency.warm_up()
    guessing = rehearsed.predictor != "none"
    tops = tuple(share.top_rows for share in rehearsed.layers)
    return Run(events, tops, guessing, scores if guessing else None)


@contextmanager
def aside(engine: Engine) -> Iterator[None]:
    """Within, replies are recorded apart and live settings may change; afterwards all is as before, come what may.

    For trying things out: the session's telemetry does not notice. KV memory goes on.
    """
    residency, governor = engine.residency, engine.governor
    with engine.turn.between_replies():
        settings, plan, telemetry = governor.settings, governor.plan, residency.telemetry
        residency.telemetry = telemetry.fresh()
        residency.telemetry.set_phase("idle")
    try:
        yield
    finally:
        with engine.turn.held():
            if not engine.turn.closed:
                residency.forget_guesses()
                residency.loads.discard()
                residency.telemetry, governor.settings = telemetry, settings
                engine.turn.stop.clear()  # a stop ends what was tried out, not its tidying up
                governor.apply(plan)
                residency.warm_up()


def start_over(engine: Engine, earlier: RoutingTrace | None) -> None:
    """Empties caches and eviction history, as after a start that knows what `earlier` tokens used.

    For comparisons that shall begin alike; counters and KV memory go on.
    """
    with engine.turn.between_replies():
        plan = engine.plan
        engine.residency.empty()
        engine.residency.apply(plan)
        engine.governor.tell()
        if earlier is not None:
            engine.residency.remember(earlier)
            engine.residency.warm_up()
