"""Does offloading's machinery help here? Which settings to try, what each cost a token, and what to say about it. Pure.

`comparison` runs the variants on the engine and asks this module for them and for the figures; the page shows rows and
verdict. Figures are read from the recorded trace of a reply, without its first tokens, which find caches that are still
filling. A difference counts only when every pass of one side beats every pass of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np

from .spec import Plan, Settings
from .trace import EventKind, Outcome, Trace, TracePhase

WARM_UP = 4  # decoded tokens of a reply that do not count
WORTH = 1.03  # a speed that many times another one is worth a word
LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("All switched off (on demand)", {"strategy": "on-demand", "split": None, "prefetch": "off"}),
    ("Cache", {"strategy": "moepic", "split": 1.0, "prefetch": "off"}),
    ("Cache + split", {"strategy": "moepic", "split": None, "prefetch": "off"}),
    ("Cache + split + prefetch", {"strategy": "moepic", "split": None, "prefetch": "on"}),
)
EVERYTHING = ("cache", "split", "prefetch")


@dataclass(frozen=True)
class Variant:
    name: str
    changes: dict[str, Any]  # of live settings, from the present ones


class Tally(NamedTuple):
    """What the counted tokens of one reply did."""

    token_s: tuple[float, ...]
    uses: int
    hits: int
    partial_hits: int
    link_bytes: int
    stall_s: float

    @property
    def tokens(self) -> int:
        return len(self.token_s)

    @property
    def tokens_per_s(self) -> float:
        """By the median, since other programs disturb a few of so few tokens."""
        return 1 / median(self.token_s)


@dataclass(frozen=True)
class Row:
    """One variant with all its passes; the last row of a table is that of the present settings."""

    variant: Variant
    plan: Plan  # that held
    passes: tuple[Tally, ...]

    @property
    def total(self) -> Tally:
        times, *counts = zip(*self.passes, strict=True)
        return Tally(tuple(chain(*times)), *(sum(column) for column in counts))

    def beats(self, other: Row) -> bool:
        """Clearly: with another plan, in every pass, and by enough to care."""
        if _essence(self.plan) == _essence(other.plan):
            return False
        worst = min(tally.tokens_per_s for tally in self.passes)
        best = max(tally.tokens_per_s for tally in other.passes)
        return worst > best and self.total.tokens_per_s > WORTH * other.total.tokens_per_s


class Verdict(NamedTuple):
    kind: Literal["helps", "same", "slower"]
    text: str
    better: int | None  # row of the settings to be offered instead; None: none was clearly faster


def variants(settings: Settings, plan: Plan) -> list[Variant]:
    """What to try beside `settings`, under which `plan` holds; they come last themselves."""
    has_all = parts(plan) == EVERYTHING
    present = Variant("Your settings" + ("" if has_all else f": {' + '.join(parts(plan)) or 'on demand'}"), {})
    if has_all:
        present = Variant("Cache + split + prefetch: your settings", {})
    return [*(Variant(name, changes) for name, changes in LADDER[: 3 if has_all else 4]), present]


def _essence(plan: Plan) -> tuple[object, ...]:
    """All that speed depends on."""
    return plan.layers, plan.staging_records, plan.eviction, plan.predictor, plan.prefetch_depth, plan.misses


def parts(plan: Plan) -> tuple[str, ...]:
    """Of EVERYTHING, what `plan` makes use of."""
    has_cache = any(share.slots for share in plan.layers)
    has_split = any(share.slots and 0 < share.split_ratio < 1 for share in plan.layers)
    used = (has_cache, has_split, plan.predictor != "none" and plan.prefetch_depth > 0)
    return tuple(part for part, is_used in zip(EVERYTHING, used, strict=True) if is_used)


def tally(trace: Trace, reply: int) -> Tally | None:
    """The decoded tokens of `reply` after its first WARM_UP; None when there are none. Ours: sums over trace rows."""
    events, routing = trace.events, trace.routing
    ours = events[(events["phase"] == TracePhase.DECODE) & (events["reply"] == reply)]
    made = ours[ours["kind"] == EventKind.TOKEN]
    if trace.lost_events:  # what happened for the oldest token left may be lost in part
        made = made[made["token"] > events["token"][0]]
    counted = made[WARM_UP:]
    if not len(counted):
        return None
    ours = ours[np.isin(ours["token"], counted["token"])]
    rows = routing[(routing["phase"] == TracePhase.DECODE) & np.isin(routing["token"], counted["token"])]
    kind, seconds = ours["kind"], ours["end_s"] - ours["start_s"]
    return Tally(
        token_s=tuple((counted["end_s"] - counted["start_s"]).tolist()),
        uses=int(rows["counts"].sum()),
        hits=int(rows["counts"][rows["outcomes"] == Outcome.HIT].sum()),
        partial_hits=int(rows["counts"][rows["outcomes"] == Outcome.PARTIAL].sum()),
        link_bytes=int(ours["nbytes"][np.isin(kind, (EventKind.DEMAND, EventKind.PREFETCH))].sum()),
        stall_s=float(seconds[kind == EventKind.STALL].sum()),
    )


def verdict(rows: Sequence[Row]) -> Verdict:
    """What the table means: `rows` begin with all switched off and end with the present settings."""
    off, yours = rows[0], rows[-1]
    speeds = [row.total.tokens_per_s for row in rows]
    fastest = max(range(len(rows)), key=speeds.__getitem__)
    better = fastest if rows[fastest].beats(yours) else None
    ratio = speeds[-1] / speeds[0]
    if off.beats(yours):
        text = f"With your settings it is slower than with all switched off: {ratio:.2f} times the speed."
        return Verdict("slower", text + _advice(rows, better), better)
    if yours.beats(off):
        text = f"It helps: your settings are {ratio:.2f} times as fast as all switched off."
        return Verdict("helps", text + _advice(rows, better), better)
    text = (
        f"No clear difference: your settings had {ratio:.2f} times the speed of all switched off, but not every time."
    )
    return Verdict("same", text + _advice(rows, better), better)


def _advice(rows: Sequence[Row], better: int | None) -> str:
    if better is None:
        return ""
    return f" Fastest was “{rows[better].variant.name}” with {rows[better].total.tokens_per_s:.1f} tokens/s."
