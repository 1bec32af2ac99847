"""Works out the pictures of `explore` on demand: one job for each, its slow parts in a process of low priority.

Routes start a view and ask until it is done. What the loaded model's telemetry, costs and routing say is read here; the
child process (see `elsewhere`) gets plain data and gives plain data back, so neither engine nor page waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moepic_core.errors import BadSettings
from moepic_core.metrics import Snapshot
from moepic_core.spec import STRATEGIES, Plan
from moepic_core.steering import Steering

from . import explore
from .elsewhere import elsewhere
from .explore import Figure
from .jobs import Job, Tell
from .nouns import Loaded
from .origin import origin
from .state import State

VIEWS = ("timeline", "budgets", "sizes")


class Picture(NamedTuple):
    loads: int  # of the model that it is of, as in Look
    figure: Figure


class Explorer:
    """See the module. Every view has one picture for all tabs, until it is asked for anew."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._jobs = {view: Job(f"moepic-{view}") for view in VIEWS}
        self._makers = {"timeline": self._timeline, "budgets": self._budgets, "sizes": self._sizes}

    def start(self, view: str) -> None:
        """Raises BadSettings when it is under way already."""
        self._jobs[view].start(lambda tell: self.make(view, tell))

    def stop(self, view: str) -> None:
        self._jobs[view].stop()

    def close(self) -> None:
        for job in self._jobs.values():
            job.stop()
        for job in self._jobs.values():
            job.close()

    def view(self, view: str) -> dict[str, Any]:
        """How far it is, and the newest picture if it is of the model that is loaded now."""
        return {**self._jobs[view].view(), "figure": self.figure(view)}

    def figure(self, view: str) -> Figure | None:
        found: Picture | None = self._jobs[view].result
        return found.figure if found is not None and found.loads == self._state.look().loads else None

    def make(self, view: str, tell: Tell) -> Picture:
        """The picture, made now. Raises BadSettings when there is nothing to make it from."""
        return Picture(self._state.look().loads, self._makers[view](tell))

    def _known(self) -> tuple[Loaded, Snapshot, Plan, Steering]:
        if self._state.comparing:
            raise BadSettings("settings are being compared; stop that, or wait until it is done")
        look, steering = self._state.look(), self._state.steering
        if look.loaded is None or look.snapshot is None or look.snapshot.plan is None or steering is None:
            raise BadSettings("no model is loaded; choose a checkpoint and press Load")
        return look.loaded, look.snapshot, look.snapshot.plan, steering

    def _timeline(self, tell: Tell) -> Figure:
        tell(0.0, "reading events")
        self._known()
        telemetry = self._state.telemetry
        assert telemetry is not None
        events, _ = telemetry.events()
        figure = explore.timeline(events)
        if figure is None:
            raise BadSettings("no token was made yet; ask something first")
        return figure

    def _budgets(self, tell: Tell) -> Figure:
        loaded, snapshot, plan, steering = self._known()
        if steering.costs is None:
            raise BadSettings("nothing was measured on this machine yet; load the model again to measure it")
        trace, needs, costs = steering.trace(), steering.needs, steering.costs
        present = plan.memory.budget
        axis = explore.axis_of_budgets(needs, present)
        found = {}
        with elsewhere(tell) as away:
            for number, name in enumerate(STRATEGIES):
                say = (number / len(STRATEGIES), f"planning {name}")
                settings = explore.as_strategy(loaded.settings, name)
                found[name] = away(say, explore.budgets_of, settings, needs, costs, trace, axis, present)
        measured_s = snapshot.reply.tpot_s if snapshot.reply is not None else None
        return explore.budgets_figure(found, present, measured_s, loaded.settings.strategy, origin(trace))

    def _sizes(self, tell: Tell) -> Figure:
        _, _, plan, steering = self._known()
        trace = steering.trace()
        if trace is None:
            raise BadSettings("too few tokens were made yet to replay; ask something first")
        trace = explore.newest(trace)
        shares = explore.belady_shares(trace)
        pieces = len(explore.POLICIES) + len(shares)
        curves: dict[str, tuple[list[float], list[float]]] = {}
        best: dict[float, float] = {}
        with elsewhere(tell) as away:
            for policy, name in explore.POLICIES.items():
                curves[policy] = away((len(curves) / pieces, f"replaying {name}"), explore.policy_curve, trace, policy)
            for share in shares:
                say = ((len(curves) + len(best)) / pieces, f"looking ahead with {share:.0%} cached")
                best[share] = away(say, explore.belady_size, trace, share)
        return explore.sizes_figure(curves, best, plan.layers, trace)
