"""A report for somebody else: one HTML file with figures, comparison and pictures that opens without any network. Pure.

Plotly's JavaScript is written into it, so pictures can be zoomed there too. Names of models and checkpoints come from
files that are not ours: they only get in through `escape`, and data in scripts has no "<". The file's own policy
forbids every request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moepic_core.metrics import Counters
from moepic_core.units import format_bytes

from . import gauges
from .explore import Figure
from .sensors import Sample
from .share import Recorded, settings_of
from .terms import define
from .views import UNKNOWN, geometry, number, percent, size

TITLES = {
    "timeline": "Timeline of recent tokens",
    "budgets": "Time per token over the budget",
    "sizes": "Hit rate over the cache size",
}
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
  :root { color-scheme: light dark; --ink: #16202c; --mute: #566373; --faint: #66727f; --line: #dfe5ec; --card: #fff;
    --page: #f3f5f8; --gpu: #0072b2; --gpu-light: #56b4e9; --cpu: #009e73; --bus: #e69f00; --violet: #8f6bb3;
    --slate: #5d6b7a; --stall: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8eef5; --mute: #9aa9ba; --faint: #8393a5; --line: #263241;
    --card: #141c26; --page: #0c1219; --gpu: #3b8fd1; --gpu-light: #a9d8f8; --cpu: #3fc48f; --bus: #f0b135;
    --violet: #b79bd6; --slate: #8d9bab; --stall: #ff9a8f; } }
  body { font: 15px/1.5 "IBM Plex Sans", system-ui, sans-serif; color: var(--ink); background: var(--page);
    max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1.2rem 1rem;
    margin: 1rem 0; overflow-x: auto; }
  h1 { margin-bottom: 0; } h2 { font-size: 1.1rem; margin: .4rem 0; } p { color: var(--mute); }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
  th { font-weight: 400; color: var(--mute); } td { overflow-wrap: anywhere; }
  abbr { text-decoration: underline dotted; cursor: help; }
  .plot { height: 430px; }
"""
_DRAW = """
  const style = () => getComputedStyle(document.documentElement);
  const paint = (value) => Array.isArray(value) ? value.map(paint)
    : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v)]))
    : typeof value === "string" && value.startsWith("--") ? style().getPropertyValue(value).trim() : value;
  const draw = () => { for (const [name, figure] of Object.entries(FIGURES)) {
    const axis = { gridcolor: "--line", zerolinecolor: "--line" };
    const layout = { margin: { l: 56, r: 12, t: 8, b: 44 }, paper_bgcolor: "#0000", plot_bgcolor: "#0000",
      font: { color: "--ink", family: "system-ui, sans-serif" }, hovermode: "closest", ...figure.layout,
      xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis } };
    Plotly.react(name, paint(figure.data), paint(layout), { responsive: true, displaylogo: false });
  } };
  draw(); matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def report(
    known: Recorded, figures: Mapping[str, Figure], comparison: Mapping[str, Any] | None, plotly_js: str, made: str
) -> str:
    """The whole file. `figures` by their names in TITLES, `comparison` as `helping.table` makes it."""
    loaded, snapshot = known.loaded, known.snapshot
    title = f"MoEpic: {loaded.spec.name}"
    plots = "".join(
        f"<section><h2>{TITLES[name]}</h2><div class='plot' id='{name}'></div><p>{escape(figure['note'])}</p></section>"
        for name, figure in figures.items()
    )
    data = json.dumps({name: {"data": each["data"], "layout": each["layout"]} for name, each in figures.items()})
    script = f"<script>{plotly_js}</script><script>const FIGURES = {_in_script(data)};{_DRAW}</script>"
    plan = f"<p>{escape(snapshot.plan.reason)}</p>" if snapshot.plan else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>Made {escape(made)}. {escape(_link(known))}</p>"
        f"<section><h2>Figures</h2>{_figures(known)}</section>{_comparison(comparison)}{plots}"
        f"<section><h2>Model, machine and settings</h2>{plan}{_facts(known)}</section>{_hardware(known.sample)}"
        f"{script if figures else ''}"
        "</body></html>"
    )


def _in_script(data: str) -> str:
    """JSON that cannot end a script."""
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _link(known: Recorded) -> str:
    label = known.loaded.link.label
    return f"All times were measured over an {label}." if known.loaded.link.kind == "emulated" else f"Link: {label}."


def _figures(known: Recorded) -> str:
    reply, scopes = known.snapshot.reply, (known.snapshot.last_reply.decode, known.snapshot.session.decode)
    rows = [
        _row("Speed", "tokens_per_s", number(reply.tokens_per_s if reply else None, "{:.1f} tokens/s"), ""),
        _row("First token", "ttft_s", number(reply.ttft_s if reply else None, "{:.2f} s"), ""),
        *(_row(label, name, *(percent(getattr(scope.total, name)) for scope in scopes)) for label, name in (
            ("Hits", "hit_rate"), ("Partial hits", "partial_hit_rate"), ("Misses", "miss_rate"),
            ("Overlap", "overlap"), ("Prefetch accuracy", "prefetch_accuracy"),
        )),
        _row("Stall", "stall_s", *(f"{scope.total.stall_s:.2f} s" for scope in scopes)),
        _row("Demand loads", "demand_bytes", *(format_bytes(_moved(scope)[0]) for scope in scopes)),
        _row("Prefetched", "prefetch_bytes", *(format_bytes(_moved(scope)[1]) for scope in scopes)),
    ]  # fmt: skip
    return _table(("", "Last answer", "Session"), rows)


def _moved(scope: Counters) -> tuple[int, int]:
    return scope.total.demand_bytes, scope.total.prefetch_bytes


def _row(label: str, metric: str, *cells: str) -> list[str]:
    return [f'<abbr title="{escape(define(metric))}">{escape(label)}</abbr>', *(cell or UNKNOWN for cell in cells)]


def _comparison(table: Mapping[str, Any] | None) -> str:
    if table is None:
        return ""
    rows = [
        [escape(str(row[key])) for key in ("name", "speed", "ratio", "hits", "partial", "bytes", "stall")]
        for row in table["rows"]
    ]
    head = ("", "tokens/s", "ratio", "hits", "partial hits", "over the link per token", "stall per token")
    return (
        f"<section><h2>Is it helping?</h2><p>{escape(table['verdict'])} Asked: “{escape(table['question'])}”, "
        f"{escape(table['tokens'])}.</p>{_table(head, rows)}</section>"
    )


def _facts(known: Recorded) -> str:
    loaded = known.loaded
    settings = {**settings_of(loaded.settings), "checkpoint": loaded.spec.name}
    facts = [
        ("Model", f"{loaded.spec.name}: {geometry(loaded.spec)}; {size(loaded.spec)}"),
        ("Machine", f"{loaded.machine.device_name}, {loaded.machine.cpu_cores} cores, "
                    f"{format_bytes(loaded.machine.device_total_bytes)} device memory"),
        *((name, str(value)) for name, value in settings.items() if value is not None),
    ]  # fmt: skip
    return _table((), [[escape(name), escape(value)] for name, value in facts])


def _hardware(sample: Sample | None) -> str:
    if sample is None:
        return ""
    rows = [[escape(name), escape(text)] for name, text in gauges.readings(sample)]
    return f"<section><h2>Hardware, as it was then</h2>{_table((), rows)}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML already."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"
