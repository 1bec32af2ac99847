"""An exported trace as somebody else would read it: with NumPy and the formulas that it holds, and nothing of ours.

Tests of the page compare every number that is shown with what `Export` finds.
"""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import numpy as np


class Export:
    def __init__(self, data: bytes) -> None:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            self.events, self.routing, self.residency = (file[name] for name in ("events", "routing", "residency"))
            self.about = json.loads(file["about"].tobytes())
        codes = self.about["codes"]
        self.kind, self.outcome, self.phase = codes["kind"], codes["outcomes"], codes["phase"]
        self.formulas = {metric["name"]: metric["formula"] for metric in self.about["metrics"] if metric["formula"]}
        layers = self.about["model"]["moe_layers"]
        self.num_layers, self.num_experts = len(layers), max(layer["num_experts"] for layer in layers)
        self._credit = self._first_cover(self.events)

    def figures(
        self, phase: str | None = "DECODE", reply: int | None = None, layer: int | None = None
    ) -> dict[str, Any]:
        """Every figure that has a formula, over the wanted rows; None where it is undefined."""
        wanted = {"reply": reply, "layer": layer, "phase": None if phase is None else self.phase[phase]}
        events, routing = (
            np.all(
                [rows[name] == value for name, value in wanted.items() if value is not None] or [rows["reply"] > 0],
                axis=0,
            )
            for rows in (self.events, self.routing)
        )
        return self._evaluate(self.events[events], self.routing[routing], self._credit[events], list(self.formulas))

    def of_tokens(self, name: str, tokens: np.ndarray) -> Any:
        """The figure `name` over the events of these tokens' passes, and their own transfers alone."""
        events = self.events[np.isin(self.events["token"], tokens["token"])]
        return self._evaluate(events, self.routing[:0], self._first_cover(events), [name])[name]

    @property
    def decoded(self) -> np.ndarray:
        """The events of decoded tokens."""
        tokens = self.events["kind"] == self.kind["TOKEN"]
        return self.events[tokens & (self.events["phase"] == self.phase["DECODE"])]

    def uses(self) -> np.ndarray:
        """Experts of every decoded token: [tokens, layers, top_k]."""
        rows = self.routing[self.routing["phase"] == self.phase["DECODE"]]
        return rows[np.lexsort((rows["layer"], rows["token"]))]["experts"].reshape(
            -1, self.num_layers, rows["experts"].shape[1]
        )

    def _evaluate(self, events: Any, routing: Any, credit: Any, names: list[str]) -> dict[str, Any]:
        known = {
            "np": np, "routing": routing, "outcomes": routing["outcomes"], "counts": routing["counts"],
            "kind": events["kind"], "nbytes": events["nbytes"], "end_s": events["end_s"],
            "seconds": events["end_s"] - events["start_s"], "credit": credit, "residency": self.residency,
            "num_layers": self.num_layers, "num_experts": self.num_experts, **self.kind, **self.outcome,
        }  # fmt: skip
        for name in names:
            try:
                with np.errstate(divide="raise", invalid="raise"), warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)  # of no rows
                    value = eval(self.formulas[name], known)
                known[name] = value.item() if isinstance(value, np.generic) else value
            except (ZeroDivisionError, FloatingPointError, RuntimeWarning, IndexError, ValueError, TypeError):
                known[name] = None
        return known

    def _first_cover(self, events: np.ndarray) -> np.ndarray:
        """Seconds of each transfer that none recorded before it covers; 0 for other events."""
        credit, starts, ends = np.zeros(len(events)), np.empty(0), np.empty(0)
        for place in np.flatnonzero(np.isin(events["kind"], [self.kind["DEMAND"], self.kind["PREFETCH"]])):
            start, end = events["start_s"][place], events["end_s"][place]
            touched = (ends >= start) & (starts <= end)
            overlap = np.minimum(ends[touched], end) - np.maximum(starts[touched], start)
            credit[place] = end - start - overlap.sum()
            low, high = min([start, *starts[touched]]), max([end, *ends[touched]])
            starts, ends = np.append(starts[~touched], low), np.append(ends[~touched], high)
        return credit


def best_possible(tokens: list[list[int]], slots: int) -> np.ndarray:
    """Belady's hits of one layer, [tokens, top_k]: what is used again last leaves; a token's own experts all get in."""

    def next_use(expert: int, now: int) -> int:
        return next((later for later in range(now + 1, len(tokens)) if expert in tokens[later]), len(tokens))

    cache: set[int] = set()
    hits = []
    for now, experts in enumerate(tokens):
        hits.append([expert in cache for expert in experts])
        cache |= set(experts)
        leaving = sorted(cache, key=lambda expert: (expert not in experts, next_use(expert, now)))
        cache = set(leaving[:slots])
    return np.array(hits)
