"""How the demonstration model routes: the figures and the picture of its model card, from a recorded trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from benchmarks.pictures import save
from moepic_core.hit_curves import ranks
from moepic_core.routing import RoutingTrace


def figures(trace: RoutingTrace) -> dict[str, Any]:
    """Hit rates at one third of the experts cached, hot sets per subject, accuracy of guesses, experts never used."""
    use = usage(trace)  # [subjects, layers, experts]
    third = [round(count / 3) for count in trace.num_experts]
    rates = {policy: hit_rate(trace, policy, third) for policy in ("lru", "lfu", "lcp", "random")}
    return {
        "tokens": trace.num_tokens,
        "never used": int((use.sum(0) == 0).sum()),
        "hit rate at one third cached": rates,
        "chance": float(np.mean([slots / count for slots, count in zip(third, trace.num_experts, strict=True)])),
        "overlap of hot sets": overlap(use, third),
        "guesses right per layer": accuracy(trace).round(3).tolist(),
    }


def hit_rate(trace: RoutingTrace, policy: str, slots: list[int]) -> float:
    """Of whole experts, from empty caches with `slots` per layer, under the engine's rules."""
    found = ranks(policy, trace).experts
    hits = (found >= 0) & (found < np.array(slots)[:, None])
    return float(hits.sum() / (found >= 0).sum())


def usage(trace: RoutingTrace) -> NDArray[np.int64]:
    """How often each subject used each expert: `[subjects, layers, experts]`."""
    use = np.zeros((len(trace.subject_names), len(trace.num_experts), max(trace.num_experts)), np.int64)
    tokens, layers, places = np.nonzero(trace.experts >= 0)
    np.add.at(use, (trace.subjects[tokens], layers, trace.experts[tokens, layers, places]), 1)
    return use


def overlap(use: NDArray[np.int64], hot: list[int]) -> float:
    """Mean share of a subject's `hot` most used experts that is also among another's, over layers and pairs."""
    shares = []
    for layer, count in enumerate(hot):
        sets = [set(np.argsort(-row[layer], kind="stable")[:count].tolist()) for row in use]
        shares += [len(a & b) / count for number, a in enumerate(sets) for b in sets[:number]]
    return float(np.mean(shares))


def accuracy(trace: RoutingTrace) -> NDArray[np.float64]:
    """Share of guessed experts that were used, per layer."""
    made = trace.guesses >= 0
    right = (trace.guesses[..., :, None] == trace.experts[..., None, :]).any(-1) & made
    return right.sum((0, 2)) / np.maximum(1, made.sum((0, 2)))


def picture(trace: RoutingTrace, path: Path) -> None:
    """Layer × expert use, one panel per subject."""
    use = usage(trace)
    columns = 5
    rows = -(-len(trace.subject_names) // columns)
    figure = make_subplots(
        rows, columns, subplot_titles=trace.subject_names, shared_yaxes=True, shared_xaxes=True,
        horizontal_spacing=0.015, vertical_spacing=0.1,
    )  # fmt: skip
    for number, counts in enumerate(use):
        share = counts / np.maximum(1, counts.sum(1, keepdims=True))
        figure.add_heatmap(z=100 * share, row=number // columns + 1, col=number % columns + 1, coloraxis="coloraxis")
    figure.update_layout(
        width=1200, height=130 + 170 * rows, margin={"l": 50, "r": 20, "t": 70, "b": 40}, template="simple_white",
        title="Share of each expert in its layer's uses (%), by subject: experts across, layers down",
        coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 25},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    save(figure, path)
