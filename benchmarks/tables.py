"""The tables of `docs/RESULTS.md` in Markdown, from result files; and what the rows of a comparison say together.

`python -m benchmarks.tables RESULT.json …` prints those of `compare_strategies`, `full_scale` or `sensitivity`; several
files of one benchmark are put together. `compare_strategies` asks for `margins` and errors, `draw` for the same panels.
Milliseconds per token; in brackets by how much `moepic` is lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Row = dict[str, Any]
PAPER_RATIO, THIRD = 2.9, 1 / 3
RULES = {"Lcp": "LCP", "LcpAged": "LCP with ageing"}
POLICIES = {
    "lcp": "LCP (paper)", "lcp-aged": "LCP with ageing (ours, default)", "lru": "LRU", "lfu": "LFU", "random": "random",
    "belady": "Belady's bound",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of one benchmark; their rows are put together")
    result = read(parser.parse_args().results)
    make = {"compare_strategies": compared, "full_scale": at_full_scale, "sensitivity": sensitivities}
    print("\n".join(make[result["benchmark"]](result)))
    return 0


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """The first result, with the rows of all."""
    found: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) for path in paths]
    kinds = {each["benchmark"] for each in found}
    assert len(kinds) == 1, f"results of different benchmarks: {sorted(kinds)}"
    return {**found[0], "rows": [row for each in found for row in each.get("rows", ())]}


def compared(result: dict[str, Any]) -> list[str]:
    """Speeds, what was hit and hidden, memory for the same speed and errors of predictions, for each link."""
    lines = []
    for name, rows in by_ratio(result).items():
        lines += ["", f"**{name}**", "", *speeds(rows, share_of, "cached experts, % of all bytes")]
        lines += ["", f"*{name}: whole / partial hits, and link time hidden behind computing, %*", ""]
        lines += grid(rows, share_of, "cached experts, % of all bytes", _found)
        ours = at_share(rows, "moepic", THIRD)
        if ours is not None:
            lines += ["", f"*{name}: cached experts that `moepic`'s {1e3 * ours:.1f} ms at a third need, %*", ""]
            lines += needed(rows, ours)
        lines += ["", "; ".join(f"{what}: median {each['median']:.1%}, worst {each['worst']:.1%}"
                                for what, each in errors(rows).items()) + "."]  # fmt: skip
    return lines[1:]


def by_ratio(result: dict[str, Any]) -> dict[str, list[Row]]:
    ratios = sorted({row["ratio"] for row in result["rows"]})
    return {
        f"link {ratio:g} × slower than compute": [row for row in result["rows"] if row["ratio"] == ratio]
        for ratio in ratios
    }


def share_of(row: Row) -> float:
    return round(100 * float(row["share"]), 1)


def at_full_scale(result: dict[str, Any]) -> list[str]:
    lines = ahead(result)
    for name, rows in by_model(result).items():
        lines += ["", f"**{name}**", "", *speeds(rows, gigabytes_of, "device memory, GB")]
    return lines


def ahead(result: dict[str, Any]) -> list[str]:
    """By how much `moepic` is lower than each of the others over all budgets, and its partial hits; in percent."""
    names = [name for name in dict.fromkeys(row["strategy"] for row in result["rows"]) if name != "moepic"]
    lines = [f"| model on card | {' | '.join(names)} | partial hits |", "|---" * (len(names) + 2) + "|"]
    for model, rows in by_model(result).items():
        ours = {row["budget_bytes"]: row for row in rows if row["strategy"] == "moepic"}
        cells = [
            _span([1 - ours[row["budget_bytes"]]["tpot_s"] / row["tpot_s"] for row in rows if row["strategy"] == name])
            for name in names
        ]
        partial = _span([row["partial_hit_rate"] for row in ours.values()])
        lines.append(f"| {model} | {' | '.join(cells)} | {partial} |")
    return lines


def _span(shares: Sequence[float]) -> str:
    least, most = (round(100 * share) for share in (min(shares), max(shares)))
    return f"{least} to {most}" if least < most else f"{least}"


def by_model(result: dict[str, Any]) -> dict[str, list[Row]]:
    pairs = dict.fromkeys((row["model"], row["machine"]) for row in result["rows"])
    return {f"{model} on {machine}": [row for row in result["rows"] if row["model"] == model]
            for model, machine in pairs}  # fmt: skip


def gigabytes_of(row: Row) -> float:
    return round(float(row["budget_bytes"]) / 1e9, 1)


def sensitivities(result: dict[str, Any]) -> list[str]:
    lines = [*speeds(result["paper"], share_of, "strategy", "{:.1f} %"), ""]
    lines += grid(result["splits"], lambda row: row["split"], "cached", _ms, "θ = {}", share_of, "{:.1f} %")
    lines += [
        "",
        *grid(result["steps"], lambda row: 100 * row["step"], "cached", _ms, "{:.1f} %", share_of, "{:.1f} %"),
    ]
    for kind in ("recorded", "synthetic"):
        lines += ["", f"*{result[kind]['source']}*", ""]
        lines += grid(result[kind]["policies"], share_of, "policy", _hits, "{:.1f} % cached",
                      lambda row: POLICIES[row["policy"]])  # fmt: skip
        lines += ["", *grid(result[kind]["constants"], lambda row: row["omega"], "rule, ρ", _rate, "ω = {}",
                            lambda row: f"{RULES[row['rule']]}, {row['rho']:g}")]  # fmt: skip
    return lines


def speeds(rows: Sequence[Row], x_of: Callable[[Row], float], x_name: str, head: str = "{:g}") -> list[str]:
    ours = {x_of(row): row["tpot_s"] for row in rows if row["strategy"] == "moepic"}

    def cell(row: Row) -> str:
        own = "" if row["strategy"] == "moepic" or x_of(row) not in ours else f" ({lower(row, ours[x_of(row)])})"
        return f"{1e3 * row['tpot_s']:.1f}{own}"

    return grid(rows, x_of, x_name, cell, head)


def lower(row: Row, ours_s: float) -> str:
    return f"{100 * (1 - ours_s / row['tpot_s']):+.0f} %"


def grid(
    rows: Sequence[Row],
    x_of: Callable[[Row], Any],
    corner: str,
    cell: Callable[[Row], str],
    head: str = "{:g}",
    y_of: Callable[[Row], Any] = lambda row: row["strategy"],
    side: str = "{}",
) -> list[str]:
    """One line for each `y_of`, one column for each `x_of`; None as a column's head is what was planned."""
    columns, lines = dict.fromkeys(map(x_of, rows)), dict.fromkeys(map(y_of, rows))
    cells = {(y_of(row), x_of(row)): cell(row) for row in rows}
    heads = ["planned" if x is None else head.format(x) for x in columns]
    return [
        f"| {corner} | " + " | ".join(heads) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {side.format(y)} | " + " | ".join(cells.get((y, x), "–") for x in columns) + " |" for y in lines),
    ]


def _found(row: Row) -> str:
    hidden = "–" if row["overlap"] is None else f"{100 * row['overlap']:.0f}"
    return f"{100 * row['hit_rate']:.0f} / {100 * row['partial_hit_rate']:.0f}, {hidden}"


def _ms(row: Row) -> str:
    return f"{1e3 * row['tpot_s']:.1f}"


def _hits(row: Row) -> str:
    return f"{100 * row['hit_rate']:.1f} ({100 * row['after_a_change']:.1f})"


def _rate(row: Row) -> str:
    return f"{100 * row['hit_rate']:.1f}"


def at_share(rows: Iterable[Row], strategy: str, share: float) -> float | None:
    return next((r["tpot_s"] for r in rows if r["strategy"] == strategy and abs(r["share"] - share) < 0.01), None)


def needed(rows: Sequence[Row], ours_s: float) -> list[str]:
    """The least share with which each strategy is as fast, on straight lines between those that were measured."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    shares = {name: enough([row for row in rows if row["strategy"] == name], ours_s) for name in names}
    cells = ["more than measured" if share is None else f"{100 * share:.0f}" for share in shares.values()]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(cells)} |"]


def enough(rows: Sequence[Row], ours_s: float) -> float | None:
    """The least share with which one strategy takes `ours_s`; None if all that were measured are too small."""
    rows = sorted(rows, key=lambda row: float(row["share"]))
    for place, row in enumerate(rows):
        if row["tpot_s"] <= ours_s:
            if place == 0:
                return float(row["share"])
            before = rows[place - 1]
            part = (before["tpot_s"] - ours_s) / (before["tpot_s"] - row["tpot_s"])
            return float(before["share"] + part * (row["share"] - before["share"]))
    return None


def margins(rows: Sequence[Row]) -> dict[str, Any]:
    """How much lower moepic's TPOT is than each baseline's, and the memory they need for its TPOT at a third."""
    found: dict[str, Any] = {}
    ours = {(row["ratio"], row["share"]): row["tpot_s"] for row in rows if row["strategy"] == "moepic"}
    third = at_share([row for row in rows if row["ratio"] == PAPER_RATIO], "moepic", THIRD)
    for name in dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "moepic"):
        theirs = [row for row in rows if row["strategy"] == name]
        found[name] = {
            f"{row['ratio']:g}x, {share_of(row)} %": round(1 - ours[row["ratio"], row["share"]] / row["tpot_s"], 4)
            for row in theirs if (row["ratio"], row["share"]) in ours
        }  # fmt: skip
        if third is not None:
            share = enough([row for row in theirs if row["ratio"] == PAPER_RATIO], third)
            found[name]["share of experts for moepic's TPOT at 33 %, 2.9x"] = share
    return {**found, **errors(rows)}


def errors(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    off = {
        "plan off by": [row["planned_over_measured"] - 1 for row in rows],
        "prediction off by": [row["predicted_over_measured"] - 1 for row in rows],
        "replay off by": [row["simulated_over_measured"] - 1 for row in rows],
        "replay's hit rate off by": [row["simulated_hit_rate"] - row["hit_rate"] for row in rows],
        "share foreseen off by": [row["expected_foreseen"] - row["foreseen"] for row in rows],
        "slowest round over fastest": [row["tpot_s_max"] / row["tpot_s_min"] - 1 for row in rows],
    }
    return {what: {"median": round(median(np.abs(each).tolist()), 4), "worst": round(float(np.abs(each).max()), 4)}
            for what, each in off.items()}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
