"""What a token would cost along the whole budget slider: made elsewhere, one after another, remembered while it holds.

Previews ask whenever the page shows a model, and never wait: planning a large model takes seconds. `changed` is called
when an answer is there, and the page asks again. Planning and decoding are both many small steps of Python; in one
process they would take the interpreter from each other, and a reply be a quarter as fast. Knows no engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from moepic_core.budgets import Needs
from moepic_core.costs import Costs
from moepic_core.planner import what_if
from moepic_core.routing import RoutingTrace
from moepic_core.spec import Settings

from .elsewhere import child
from .nouns import Forecast
from .origin import origin

NUM_POINTS = 24  # budgets for which a plan is made
MOST_KNOWN = 16  # forecasts that are remembered


class Forecasts:
    """See the module. Close it to end the thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._known: dict[Hashable, tuple[Hashable, Forecast]] = {}
        self._asked: dict[Hashable, Hashable] = {}  # what the thread works on, or will
        self._thread = ThreadPoolExecutor(1, "forecast")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def get(
        self,
        key: Hashable,
        age: Hashable,
        settings: Settings,
        needs: Needs,
        costs: Costs,
        trace: Callable[[], RoutingTrace | None],
        largest: int,
    ) -> Forecast | None:
        """The forecast for `key`; None until it is made for the first time. Another `age` makes it anew meanwhile.

        Budgets go from the smallest to `largest` bytes, or to everything. `trace` is called by the thread.
        """
        with self._lock:
            known_age, known = self._known.get(key, (None, None))
            is_due = known_age != age and self._asked.get(key) != age
            if is_due:
                self._asked[key] = age
        if is_due:
            made = self._thread.submit(forecast, settings, needs, costs, trace, largest)
            made.add_done_callback(lambda future: self._keep(key, age, future))
        return known

    def _keep(self, key: Hashable, age: Hashable, made: Future[Forecast]) -> None:
        if made.cancelled():
            return
        with self._lock:
            if self._asked.get(key) == age:
                del self._asked[key]
            if made.exception() is None:
                self._known.pop(key, None)
                self._known[key] = (age, made.result())
                while len(self._known) > MOST_KNOWN:
                    del self._known[next(iter(self._known))]
        made.result()  # a mistake of ours is raised where the console shows it
        self._changed()


def forecast(
    settings: Settings, needs: Needs, costs: Costs, trace: Callable[[], RoutingTrace | None], largest: int
) -> Forecast:
    low, high = needs.smallest, max(needs.smallest, min(needs.everything, largest))
    budgets = [low + (high - low) * place // (NUM_POINTS - 1) for place in range(NUM_POINTS)]
    with child() as process:
        known = trace()
        points = process.submit(what_if, settings, needs, costs, known, list(dict.fromkeys(budgets))).result()
    return Forecast(tuple(points), origin=origin(known))
