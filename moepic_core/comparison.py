"""Runs one prompt under several live settings on the loaded engine, and reads off what each cost a token.

The page asks `compare` when its user wants to know whether it helps. Settings change through the engine's own
`reconfigure` between replies. Every reply begins with caches filled as after a start, and there are two passes in
different orders, so that neither drift nor a disturbance decides. The session's figures do not notice, and the settings
of before hold again at the end, whatever happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import cast

from .ablation import WARM_UP, Row, Tally, tally, variants
from .engine import Engine, Prompt
from .errors import BadSettings, Cancelled
from .events import Done, Event, TokenMade
from .hf.text import Sampling
from .measuring import aside, start_over
from .spec import Plan

FEWEST, MOST = 4, 16  # tokens that count in a reply
ENOUGH_S = 8.0  # after which a reply with FEWEST of them ends

Tell = Callable[[float, str], None]  # share done, what is being tried; may raise Cancelled


def compare(engine: Engine, prompt: Prompt, tell: Tell) -> list[Row]:
    """The table: all switched off first, the present settings last. `tell` is asked at every token.

    Raises BadSettings for a prompt that leaves no room or while a reply is being generated, Cancelled when stopped.
    """
    # Planned anew, so that all plans stand on the same knowledge.
    settings, trials, known = engine.settings, variants(engine.settings, engine.reconfigure()), engine.steering.trace()
    found: list[list[Tally]] = [[] for _ in trials]
    plans: dict[int, Plan] = {}
    half = len(trials) // 2
    order = [*range(len(trials)), *range(half, len(trials)), *range(half)]
    with aside(engine):
        for done, place in enumerate(order):
            trial = trials[place]
            before = {name: getattr(settings, name) for name in ("strategy", "split", "prefetch")}
            plans[place] = engine.reconfigure(**{**before, **trial.changes})
            start_over(engine, known)
            found[place].append(_reply(engine, prompt, trial.name, done, len(order), tell))
    return [Row(trial, plans[place], tuple(found[place])) for place, trial in enumerate(trials)]


def _reply(engine: Engine, prompt: Prompt, name: str, done: int, replies: int, tell: Tell) -> Tally:
    """What one reply cost, after `done` of so many `replies`."""
    tokens = 1 + WARM_UP + MOST
    made, first_s = 0, time.perf_counter()
    tell(done / replies, name)
    reply = engine.generate(prompt, Sampling(max_new_tokens=tokens, ignore_eos=True))
    with closing(cast("Generator[Event]", reply)) as events:
        for event in events:
            if isinstance(event, Done) and event.reason == "stopped":
                raise Cancelled("the comparison was stopped")
            tell((done + made / tokens) / replies, name)
            if isinstance(event, TokenMade):
                made += 1
                first_s = time.perf_counter() if made == 1 else first_s
            if made > WARM_UP + FEWEST and time.perf_counter() - first_s > ENOUGH_S:
                break
    snapshot = engine.snapshot()
    assert snapshot.reply is not None, snapshot.phase
    found = tally(engine.residency.telemetry.trace(), snapshot.reply.number)
    if found is None:
        raise BadSettings(
            f"the prompt leaves no room for {WARM_UP + FEWEST} tokens in a context of {engine.context_length}; "
            "shorten it, or begin a new chat"
        )
    return found
