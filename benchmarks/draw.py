"""Pictures of benchmark results, for `docs`: seconds per token against memory, one line per strategy.

`python -m benchmarks.draw RESULT.json … --picture FILE.png` reads JSON lines of `compare_strategies` or `full_scale`
and draws them with Plotly in a Chromium without a window. Measured and simulated results get the same look and
different titles. Tables are `benchmarks.tables`'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from plotly.subplots import make_subplots

from benchmarks.pictures import save
from benchmarks.tables import Row, by_model, by_ratio, gigabytes_of, read, share_of

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
    result = read(options.results)
    if result["benchmark"] == "compare_strategies":
        title = f"Measured, emulated link: {result['checkpoint']}, {result['cpu']}"
        panels, x_of, x_name = by_ratio(result), share_of, "cached experts, % of all bytes"
    else:
        title = "Simulated: cards from data sheets, synthetic routing"
        panels, x_of, x_name = by_model(result), gigabytes_of, "device memory, GB"
    draw(panels, title, x_of, x_name, options.picture)
    return 0


def draw(panels: dict[str, list[Row]], title: str, x_of: Callable[[Row], float], x_name: str, path: Path) -> None:
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


if __name__ == "__main__":
    raise SystemExit(main())
