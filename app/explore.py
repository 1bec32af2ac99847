"""Pictures that take a while: timeline of recent tokens, TPOT over the budget, hit rate over the cache size.

Pure: traces, costs and plans in, Plotly figures out, as plain dictionaries for its JavaScript; `explorer` runs the slow
parts in another process, so what this module imports must not include torch. Colours are names of the page's CSS
variables. Every figure says in its note what is measured, predicted or simulated, and from what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepic_core.budgets import Needs
from moepic_core.costs import Breakdown, Costs
from moepic_core.hit_curves import belady_hits, hit_curve, ranks
from moepic_core.planner import make_plan, what_if
from moepic_core.routing import RoutingTrace
from moepic_core.simulator import simulate
from moepic_core.spec import LayerPlan, Settings
from moepic_core.trace import EventKind, Part, TracePhase
from moepic_core.units import format_bytes

from .origin import origin

Figure = dict[str, Any]
TIMELINE_TOKENS, TIMELINE_EVENTS = 12, 8000
FIRST_SHOWN = 2  # tokens, before anybody zooms
BUDGETS = 14  # along the axis
SIMULATED_STEPS = 6000  # tokens × layers of a simulation, which takes about a second
CURVE_STEPS = 24_000  # tokens × layers of a hit curve, likewise
BELADY_SIZES = 10
POLICIES = {
    "lcp-aged": "LCP with ageing (moepic)", "lcp": "LCP", "lru": "LRU", "lfu": "LFU", "random": "random",
}  # fmt: skip
_LANES = {  # kind → name, colour, upper edge and height of its lane within a layer's row of height 1
    EventKind.COMPUTE: ("compute", "--gpu", -0.42, 0.28),
    EventKind.STALL: ("stall", "--stall", -0.42, 0.28),
    EventKind.DEMAND: ("demand load", "--bus", -0.12, 0.24),
    EventKind.PREFETCH: ("prefetch", "--cpu", 0.14, 0.24),
}
_LOOKS = (  # of lines: colour, dash; the first is ours
    ("--gpu", "solid"), ("--bus", "dash"), ("--cpu", "dot"), ("--violet", "dashdot"), ("--slate", "longdash"),
    ("--gpu-light", "longdashdot"),
)  # fmt: skip


# ---- timeline ----


def timeline(events: NDArray[np.void]) -> Figure | None:
    """The newest decoded tokens of the last reply, every event of theirs by layer; None when there is none."""
    tokens = events[(events["kind"] == EventKind.TOKEN) & (events["phase"] == TracePhase.DECODE)]
    tokens = tokens[tokens["reply"] == tokens["reply"][-1]][-TIMELINE_TOKENS:] if len(tokens) else tokens
    if not len(tokens):
        return None
    rows = events[np.isin(events["token"], tokens["token"]) & np.isin(events["kind"], list(_LANES))]
    while len(tokens) > 1 and len(rows) > TIMELINE_EVENTS:  # as many whole tokens as draw smoothly
        tokens = tokens[1:]
        rows = rows[np.isin(rows["token"], tokens["token"])]
    start_s = float(tokens["start_s"][0])
    last_layer = int(rows["layer"].max(initial=0))
    ends_ms = (1000 * (tokens["end_s"] - start_s)).round(4)
    first_ms = ends_ms[-1 - FIRST_SHOWN] if len(ends_ms) > FIRST_SHOWN else 0.0
    return {
        "data": [_lane(kind, rows[rows["kind"] == kind], start_s) for kind in _LANES],
        "layout": {
            "barmode": "overlay",
            "xaxis": {"title": {"text": "ms"}, "range": [float(first_ms), float(ends_ms[-1])]},
            "yaxis": {
                "title": {"text": "layer"},
                "range": [last_layer + 0.5, -0.5],
                "dtick": 1 if last_layer < 12 else 4,
            },
            "shapes": [_line(float(end)) for end in ends_ms],
        },
        "note": f"Measured: the last {len(tokens)} tokens of the last answer, {len(rows)} events. Dotted lines are the "
        "ends of tokens. Drag to zoom, double-click for all.",
    }


def _lane(kind: EventKind, rows: NDArray[np.void], start_s: float) -> dict[str, Any]:
    name, colour, offset, height = _LANES[kind]
    starts, lengths = 1000 * (rows["start_s"] - start_s), 1000 * (rows["end_s"] - rows["start_s"])
    words = [
        f"layer {row['layer']}: stall, {length:.3g} ms"
        if kind is EventKind.STALL
        else f"layer {row['layer']}, expert {row['expert']}, {Part(row['part']).name.lower()}: {name}, {length:.3g} ms"
        + (f", {format_bytes(int(row['nbytes']))}" if row["nbytes"] else "")
        for row, length in zip(rows, lengths, strict=True)
    ]
    return {
        "type": "bar", "orientation": "h", "name": name, "y": rows["layer"].tolist(), "base": starts.round(4).tolist(),
        "x": lengths.round(4).tolist(), "offset": offset, "width": height, "hovertext": words, "hoverinfo": "text",
        "marker": {"color": colour, "line": {"width": 0},
                   **({"pattern": {"shape": "/", "size": 4}} if kind is EventKind.STALL else {})},
    }  # fmt: skip


# ---- TPOT over the budget ----


class Budgets(NamedTuple):
    """One strategy along the slider."""

    curve: list[tuple[int, Breakdown]]
    simulated_s: float | None  # TPOT at the present budget; None without any routing to replay


def budgets_of(
    settings: Settings, needs: Needs, costs: Costs, trace: RoutingTrace | None, budgets: Sequence[int], present: int
) -> Budgets:
    """What a token is predicted to cost under each of `budgets`, and simulated to cost under the `present` one."""
    curve = what_if(settings, needs, costs, trace, budgets)
    if trace is None:
        return Budgets(curve, None)
    replayed = trace.last(max(8, SIMULATED_STEPS // len(needs.layers)))
    plan = make_plan(settings, needs, present, costs, trace)
    return Budgets(curve, simulate(replayed, plan, costs, needs.layers, warm_up=replayed.num_tokens // 4).tpot_s)


def as_strategy(settings: Settings, name: str) -> Settings:
    """As the strategy itself would have it."""
    return settings.replace(strategy=name, split=None, eviction="auto", prefetch="auto")


def axis_of_budgets(needs: Needs, present: int) -> list[int]:
    """From the least that works to everything, the present one included."""
    axis = np.linspace(needs.smallest, needs.everything, BUDGETS).astype(int).tolist()
    return sorted({*axis, min(max(present, needs.smallest), needs.everything)})


def budgets_figure(
    found: Mapping[str, Budgets], present: int, measured_s: float | None, mine: str, source: str
) -> Figure:
    data: list[dict[str, Any]] = []
    unit, scale = ("GB", 1e9) if present >= 1e9 else ("MB", 1e6)
    for (name, strategy), (colour, dash) in zip(found.items(), _LOOKS, strict=True):
        budgets = _rounded([at / scale for at, _ in strategy.curve])
        ms = _rounded([1000 * cost.total_s for _, cost in strategy.curve])
        data.append({
            "type": "scatter", "mode": "lines", "name": name, "legendgroup": name, "x": budgets, "y": ms,
            "line": {"color": colour, "dash": dash, "width": 3.5 if name == mine else 1.8},
            "hovertemplate": f"{name}, predicted: %{{y:.1f}} ms at %{{x:.4g}} {unit}<extra></extra>",
        })  # fmt: skip
        if strategy.simulated_s is not None:
            data.append({
                "type": "scatter", "mode": "markers", "name": f"{name}, simulated", "legendgroup": name,
                "showlegend": False, "x": _rounded([present / scale]), "y": _rounded([1000 * strategy.simulated_s]),
                "marker": {"color": colour, "symbol": "diamond-open", "size": 10, "line": {"width": 2}},
                "hovertemplate": f"{name}, simulated: %{{y:.1f}} ms at %{{x:.4g}} {unit}<extra></extra>",
            })  # fmt: skip
    if measured_s is not None:
        data.append({
            "type": "scatter", "mode": "markers", "name": "measured: last answer", "x": _rounded([present / scale]),
            "y": _rounded([1000 * measured_s]), "marker": {"color": "--ink", "symbol": "star", "size": 13},
            "hovertemplate": f"measured, last answer: %{{y:.1f}} ms at %{{x:.4g}} {unit}<extra></extra>",
        })  # fmt: skip
    is_simulated = any(strategy.simulated_s is not None for strategy in found.values())
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": f"budget in {unit}"}},
            "yaxis": {"title": {"text": "ms per token (TPOT)"}, "rangemode": "tozero"},
            "shapes": [_line(present / scale)],
        },
        "note": f"Lines are predicted by the cost model{', diamonds simulated' if is_simulated else ''}: from costs "
        f"measured on this machine and the routing of {source}, for plans made with that. The last answer was made "
        "under the plan that was in use. The dotted line is the budget in use.",
    }  # fmt: skip


# ---- hit rate over the cache size ----


def newest(trace: RoutingTrace) -> RoutingTrace:
    """As much of `trace` as hit curves are made from."""
    return trace.last(max(64, CURVE_STEPS // len(trace.num_experts)))


def policy_curve(trace: RoutingTrace, policy: str) -> tuple[list[float], list[float]]:
    """Slots as a share of the experts, and the share of uses that hit in all layers together, from an empty cache."""
    found = ranks(policy, trace).experts
    curves = [hit_curve(found[:, layer], count) for layer, count in enumerate(trace.num_experts)]
    shares = np.arange(max(trace.num_experts) + 1) / max(trace.num_experts)
    rows = [curve[np.round(shares * (len(curve) - 1)).astype(int)] for curve in curves]
    uses = [int((trace.experts[:, layer] >= 0).sum()) for layer in range(len(curves))]
    return _rounded(shares.tolist()), _rounded(np.average(rows, axis=0, weights=uses).tolist())


def belady_size(trace: RoutingTrace, share: float) -> float:
    """What no policy can beat with slots for `share` of the experts."""
    hits = sum(
        int(belady_hits(np.ascontiguousarray(trace.experts[:, layer]), round(share * count), count).sum())
        for layer, count in enumerate(trace.num_experts)
    )
    return hits / max(1, int((trace.experts >= 0).sum()))


def belady_shares(trace: RoutingTrace) -> list[float]:
    most = max(trace.num_experts)
    return sorted({round(most * part / BELADY_SIZES) / most for part in range(BELADY_SIZES + 1)})


def sizes_figure(
    curves: Mapping[str, tuple[list[float], list[float]]],
    belady: Mapping[float, float],
    layers: Sequence[LayerPlan],
    trace: RoutingTrace,
) -> Figure:
    """`curves` by policy; `layers` are those of the plan in use."""
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": POLICIES[policy], "x": _percent(shares), "y": _percent(hits),
            "line": {"color": colour, "dash": dash, "width": 3 if policy == "lcp-aged" else 1.8},
            "hovertemplate": f"{POLICIES[policy]}: %{{y:.1f}} % hits with %{{x:.0f}} % cached<extra></extra>",
        }
        for (policy, (shares, hits)), (colour, dash) in zip(curves.items(), _LOOKS, strict=False)
    ]  # fmt: skip
    data.append({
        "type": "scatter", "mode": "lines+markers", "name": "Belady: no policy can do better",
        "x": _percent(list(belady)), "y": _percent(list(belady.values())),
        "line": {"color": "--ink", "width": 1.2}, "marker": {"color": "--ink", "size": 6},
        "hovertemplate": "Belady: %{y:.1f} % hits with %{x:.0f} % cached<extra></extra>",
    })  # fmt: skip
    cached = sum(share.slots for share in layers) / sum(trace.num_experts)
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "slots, % of a layer's experts"}, "range": [0, 100]},
            "yaxis": {"title": {"text": "uses that find their expert cached, %"}, "range": [0, 101]},
            "shapes": [_line(100 * cached)],
        },
        "note": f"Exact replay of {origin(trace)}, from an empty cache, without prefetch, the same share of slots in "
        "every layer. The dotted line is the mean share in use.",
    }


def _line(x: float) -> dict[str, Any]:
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": "--faint", "width": 1, "dash": "dot"}}  # fmt: skip


def _percent(shares: Sequence[float]) -> list[float]:
    return _rounded([100 * share for share in shares])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 6) for value in values]
