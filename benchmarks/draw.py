"""Pictures and tables of benchmark results, for `docs`: seconds per token against memory, one line per strategy.

`python -m benchmarks.draw RESULT.json … --picture FILE.png` reads JSON lines of `compare_strategies` or `full_scale`,
draws them with Plotly in a Chromium without a window, and prints a table in Markdown. Measured and simulated results
get the same look and different titles.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from plotly.subplots import make_subplots

from benchmarks.pictures import save

# Okabe and Ito's palette, told apart without red and green.
COLOURS = {
    "moepic": "#0072B2", "mixtral-offloading": "#E69F00", "adapmoe": "#009E73", "moe-infinity": "#CC79A7",
    "pregated": "#D55E00", "on-demand": "#666666",
}  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of one benchmark; their rows are put together")
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) for path in options.results]
    result = {**found[0], "rows": [row for each in found for row in each["rows"]]}
    if result["benchmark"] == "compare_strategies":
        panels = {f"link {ratio:g} × slower than compute": [row for row in result["rows"] if row["ratio"] == ratio]
                  for ratio in dict.fromkeys(row["ratio"] for row in result["rows"])}  # fmt: skip
        title = f"Measured, emulated link: {result['checkpoint']}, {result['cpu']}"
        x_of, x_name = (lambda row: 100 * row["share"]), "cached experts, % of all bytes"
    else:
        panels = {
            f"{name} on {machine}": [row for row in result["rows"] if row["model"] == name]
            for name, machine in dict.fromkeys((row["model"], row["machine"]) for row in result["rows"])
        }
        title = "Simulated: cards from data sheets, synthetic routing"
        x_of, x_name = (lambda row: row["budget_bytes"] / 1e9), "device memory, GB"
    draw(panels, title, x_of, x_name, options.picture)
    print("\n".join(table(panels, x_of, x_name)))
    return 0


def draw(panels: dict[str, list[dict[str, Any]]], title: str, x_of: Any, x_name: str, path: Path) -> None:
    columns = 3
    rows = -(-len(panels) // columns)
    figure = make_subplots(rows, columns, subplot_titles=list(panels), horizontal_spacing=0.06, vertical_spacing=0.16)
    for place, lines in enumerate(panels.values()):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        names = dict.fromkeys(row["strategy"] for row in lines)
        for number, name in enumerate(names):
            own = [row for row in lines if row["strategy"] == name]
            figure.add_scatter(
                x=[x_of(row) for row in own], y=[1e3 * row["tpot_s"] for row in own], name=name, legendgroup=name,
                showlegend=place == 0, mode="lines+markers", **where,
                line={"color": COLOURS.get(name, "#56B4E9"), "dash": DASHES[number % len(DASHES)],
                      "width": 3 if name == "moepic" else 2},
            )  # fmt: skip
        figure.update_xaxes(title=x_name, **where)
        figure.update_yaxes(title="ms per token" if place % columns == 0 else None, type="log", **where)
    width, height = 1300, 90 + 330 * rows
    figure.update_layout(
        width=width, height=height, title=title, template="simple_white", margin={"l": 60, "r": 20, "t": 90, "b": 50},
        legend={"orientation": "h", "y": -0.28 / rows, "x": 0},
    )  # fmt: skip
    save(figure, path)


def table(panels: dict[str, list[dict[str, Any]]], x_of: Any, x_name: str) -> list[str]:
    """Milliseconds per token; in brackets by how much moepic's is lower."""
    lines = []
    for panel, rows in panels.items():
        places = list(dict.fromkeys(round(x_of(row), 1) for row in rows))
        lines += ["", f"**{panel}**", "", f"| {x_name} | " + " | ".join(f"{place:g}" for place in places) + " |",
                  "|---" * (len(places) + 1) + "|"]  # fmt: skip
        ours = {round(x_of(row), 1): row["tpot_s"] for row in rows if row["strategy"] == "moepic"}
        for name in dict.fromkeys(row["strategy"] for row in rows):
            found = {round(x_of(row), 1): row["tpot_s"] for row in rows if row["strategy"] == name}
            cells = [_cell(found.get(place), None if name == "moepic" else ours.get(place)) for place in places]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(seconds: float | None, ours: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.1f}" + ("" if ours is None else f" ({100 * (1 - ours / seconds):+.0f} %)")


if __name__ == "__main__":
    raise SystemExit(main())
