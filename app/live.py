"""What the panels that show the engine at work draw: snapshot and newest events in, JSON out. Pure.

`watch` calls it whenever a page asks. Every number here follows from the trace by the formulas of METRICS and of
`terms`; a test recomputes them. Large arrays travel as base64 of a few bytes each, and all words are made here, so that
the page's script only draws. `None` and – mean unknown, never zero.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepic_core.metrics import Counters, Snapshot
from moepic_core.trace import EventKind, Outcome
from moepic_core.units import format_bytes

from .nouns import Look
from .terms import CEILING_TOKENS, NUM_WORST, SPEED_TOKENS
from .views import UNKNOWN, milliseconds, number, percent, span

SHOWN = (EventKind.COMPUTE, EventKind.STALL, EventKind.DEMAND, EventKind.PREFETCH)  # what a timeline draws
LINK = (EventKind.DEMAND, EventKind.PREFETCH)
# One event as it travels. `what` is kind · 4 + part, `size` an index into the distinct sizes, times are in 65535ths of
# the token's own time.
WIRE = np.dtype([("what", "u1"), ("size", "u1"), ("layer", "<u2"), ("expert", "<i2"), ("start", "<u2"), ("end", "<u2")])
TIME_STEPS, USE_STEPS, NO_EXPERT = 65535, 63, 3
FRESH = 0.8  # of the counted uses that a ceiling must know to be shown beside them


@dataclass(frozen=True, eq=False)
class Heard:
    """What the events said lately."""

    speeds: Sequence[tuple[int, float]] = ()  # (reply, seconds) of the newest decoded tokens
    token: np.void | None = None  # the newest decoded token's own event
    events: NDArray[np.void] | None = None  # those of its pass that a timeline shows
    link_bytes_per_s: float = 0.0  # expert traffic now


@dataclass(frozen=True)
class Ceiling:
    """What the best possible cache would have hit, per layer (see `terms`): None where there was no use."""

    loads: int  # of the model that it is of, as in Look
    reply: int  # the last one then
    num_tokens: int
    last_reply: tuple[float | None, ...]
    session: tuple[float | None, ...]
    reply_uses: int = 0  # of experts, that `last_reply` is of
    session_uses: int = 0

    def beside(self, now: Snapshot) -> tuple[tuple[float | None, ...] | None, tuple[float | None, ...] | None]:
        """For the last reply and for the session. None where it is of another reply, or of too few of the uses that are
        counted `now`: the first ones of a chat hit less, so the ceiling would be too low.
        """
        full = self.num_tokens == CEILING_TOKENS
        in_reply, in_session = now.last_reply.decode.total.uses, now.session.decode.total.uses
        same_reply = now.reply is not None and now.reply.number == self.reply
        return (
            self.last_reply if same_reply and (full or self.reply_uses >= FRESH * in_reply) else None,
            self.session if full or self.session_uses >= FRESH * in_session else None,
        )


def see(look: Look, heard: Heard, ceiling: Ceiling | None) -> dict[str, Any]:
    """Speed, layers, experts and the last token. Parts are None while there is nothing to show."""
    snapshot, loaded = look.snapshot, look.loaded
    if snapshot is None or loaded is None or snapshot.plan is None:
        return {"speed": speed(Heard()), "layers": None, "heat": None, "token": None}
    return {
        "speed": speed(heard),
        "layers": layers(snapshot, [layer.num_experts for layer in loaded.spec.moe_layers], ceiling),
        "heat": heat(snapshot, [layer.num_experts for layer in loaded.spec.moe_layers]),
        "token": token(heard, snapshot),
    }


def speed(heard: Heard) -> dict[str, Any]:
    rates = [round(1 / seconds, 2) for _, seconds in heard.speeds]
    newest = [seconds for _, seconds in heard.speeds][-SPEED_TOKENS:]
    now = number(len(newest) / sum(newest) if newest else None, "{:.1f}")
    replies = [reply for reply, _ in heard.speeds]
    return {
        "rates": rates,
        "starts": [place for place in range(1, len(replies)) if replies[place] != replies[place - 1]],
        "texts": {"speed": now},
        "label": f"Speed of the last {len(rates)} tokens, now {now} tokens per second" if rates else "No tokens yet",
    }


# ---- layers ----


def layers(snapshot: Snapshot, num_experts: Sequence[int], ceiling: Ceiling | None) -> dict[str, Any]:
    assert snapshot.plan is not None
    shares = snapshot.plan.layers
    texts = {
        "split": span([share.split_ratio for share in shares], "{:.2f}"),
        "slots": span([share.slots for share in shares], "{}"),
    }
    last, session = (None, None) if ceiling is None else ceiling.beside(snapshot)
    return {
        "last": _scope(snapshot.last_reply.decode, last, "last reply"),
        "session": _scope(snapshot.session.decode, session, "session"),
        "slots": [share.slots for share in shares],
        "split": [round(share.split_ratio, 4) for share in shares],
        "experts": list(num_experts),
        "texts": texts,
        "label": f"Per layer: split ratio {texts['split']}, slots {texts['slots']}",
    }


def _scope(counters: Counters, ceiling: Sequence[float | None] | None, name: str) -> dict[str, Any]:
    total, rows = counters.total, counters.layers
    ranked = sorted((row for row in enumerate(rows) if row[1].misses), key=lambda row: -(row[1].miss_rate or 0))
    worst = [str(layer) for layer, _ in ranked[:NUM_WORST]]
    known = [share for share in ceiling or () if share is not None]
    texts = {
        "hits": percent(total.hit_rate),
        "partial": percent(total.partial_hit_rate),
        "misses": percent(total.miss_rate),
        "ceiling": percent(sum(known) / len(known) if known else None),
        "worst": ", ".join(worst) if worst else "none" if total.uses else UNKNOWN,
        "accuracy": percent(total.prefetch_accuracy),
    }
    said = "{hits} hits, {partial} partial hits, {misses} misses, ceiling {ceiling}".format(**texts)
    return {
        "hits": [figures.hits for figures in rows],
        "partial": [figures.partial_hits for figures in rows],
        "misses": [figures.misses for figures in rows],
        "ceiling": None if ceiling is None else [None if share is None else round(share, 4) for share in ceiling],
        "texts": texts,
        "label": f"Per layer, {name}: {said}; most misses in layers {texts['worst']}"
        if total.uses
        else f"Hits per layer, {name}: nothing yet",
    }


# ---- heat map ----


def heat(snapshot: Snapshot, num_experts: Sequence[int]) -> dict[str, Any] | None:
    """One byte per expert: where it lives (an Outcome, 3 for none) in the upper two bits, its use in the lower six."""
    if snapshot.residency is None:
        return None
    rows, columns = snapshot.residency.shape
    used = snapshot.session.decode.activations[:, :columns]  # [layers, experts]
    steps = np.ceil(USE_STEPS * used / np.maximum(used.max(axis=1, keepdims=True), 1)).astype(np.uint8)
    cells = snapshot.residency << 6 | steps
    cells[np.arange(columns) >= np.array(num_experts)[:, None]] = NO_EXPERT << 6
    on_device, whole = int((snapshot.residency > 0).sum()), int((snapshot.residency == Outcome.HIT).sum())
    texts = {"on-device": f"{on_device} of {sum(num_experts)}", "whole": str(whole), "tops": str(on_device - whole)}
    return {
        "rows": rows,
        "columns": columns,
        "cells": b64encode(cells.tobytes()).decode(),
        "texts": texts,
        "label": f"{on_device} of {sum(num_experts)} experts on the device, {whole} of them whole, "
        f"{on_device - whole} with their top segment",
    }


# ---- the last token ----


def token(heard: Heard, snapshot: Snapshot) -> dict[str, Any] | None:
    if heard.token is None or heard.events is None:
        return None
    start_s, end_s = float(heard.token["start_s"]), float(heard.token["end_s"])
    kinds, seconds = heard.events["kind"], heard.events["end_s"] - heard.events["start_s"]
    stall_s = float(seconds[kinds == EventKind.STALL].sum())
    busy_s = covered(heard.events[np.isin(kinds, LINK)])
    moved = int(heard.events["nbytes"][np.isin(kinds, LINK)].sum())
    overlap = max(0.0, 1 - stall_s / busy_s) if busy_s else None
    sizes = np.unique(heard.events["nbytes"])
    texts = {
        "token": milliseconds(end_s - start_s),
        "stall": milliseconds(stall_s),
        "overlap": percent(overlap),
        "moved": format_bytes(moved),
        "accuracy": percent(snapshot.last_reply.decode.total.prefetch_accuracy),
    }
    return {
        "seconds": end_s - start_s,
        "sizes": [format_bytes(size) for size in sizes[:256]],
        "events": b64encode(wire(heard.events, sizes[:256], start_s, end_s).tobytes()).decode(),
        "texts": texts,
        "label": f"The last token took {texts['token']}, of which {texts['stall']} were a stall; "
        f"{texts['moved']} came over the link, {texts['overlap']} of its time overlapped with compute",
    }


def wire(events: NDArray[np.void], sizes: NDArray[np.int64], start_s: float, end_s: float) -> NDArray[np.void]:
    """`events` as they travel; beyond 256 different sizes the nearest smaller one stands for the rest."""
    rows = np.empty(len(events), WIRE)
    rows["what"] = 4 * events["kind"] + events["part"]
    rows["size"] = np.searchsorted(sizes, events["nbytes"], side="right") - 1
    rows["layer"], rows["expert"] = events["layer"], events["expert"]
    for name, times in (("start", events["start_s"]), ("end", events["end_s"])):
        share = np.clip((times - start_s) / max(end_s - start_s, 1e-9), 0, 1)  # a guess may begin in the pass before
        rows[name] = np.round(TIME_STEPS * share)
    return rows


def covered(events: NDArray[np.void]) -> float:
    """Seconds in which at least one of `events` was under way."""
    order = np.argsort(events["start_s"])
    starts, ends = events["start_s"][order], np.maximum.accumulate(events["end_s"][order])
    before = np.concatenate(([-np.inf], ends[:-1]))
    return float(np.maximum(0, ends - np.maximum(starts, before)).sum())
