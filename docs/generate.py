"""Writes the parts of the docs that are made from code: `python docs/generate.py`. A test holds the files to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepic_core.metrics import Metric

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))


_EXAMPLE = """
import json
import numpy as np

with np.load("moepic-trace.npz") as file:
    events, routing, about = file["events"], file["routing"], json.loads(file["about"].tobytes())
codes = about["codes"]
decode = routing[routing["phase"] == codes["phase"]["DECODE"]]
counts, outcomes = decode["counts"], decode["outcomes"]
print(np.sum(counts[outcomes == codes["outcomes"]["HIT"]]) / np.sum(counts))
transfers = np.isin(events["kind"], [codes["kind"]["DEMAND"], codes["kind"]["PREFETCH"]])
print(np.sum(events["nbytes"][transfers]))
"""


def metrics_page() -> str:
    from app.terms import PAGE_METRICS
    from moepic_core.metrics import METRICS

    lines = [
        "# Metrics",
        "",
        "Every figure that the page and the command line show: what it means, and how to recompute it from the trace.",
        "Made from `moepic_core/metrics.py` and `app/terms.py` by `python docs/generate.py`; the test suite evaluates",
        "every formula. The page shows the same definitions as tooltips, and all of them under `/ui/metrics`.",
        "",
        "Figures exist for the last reply and for the session, for prefill and decode apart, per layer and in total.",
        "A hit rate without further words is that of decode. `None` (shown as –) means unknown, never zero.",
        "",
        "Formulas see the trace's rows of the reply, phase and layer in question: `routing` with `outcomes` and",
        "`counts`; of the events `kind`, `nbytes`, `end_s`, `seconds` (end − start), and `credit` (the part of a",
        "transfer that no transfer recorded before it covers).",
        "",
        *_table(METRICS),
        "",
        "## On the page only",
        "",
        "Formulas see the rows that the definition names, the newest tokens or the last one's alone.",
        "",
        *_table(PAGE_METRICS),
        "",
        "## From an exported trace",
        "",
        "*Explore, Share, Trace (.npz)* on the page holds all that figures follow from; NumPy is enough to read it.",
        "`tests/exported.py` evaluates every formula of this page so, `tests/test_numbers.py` compares all numbers of",
        "the page with the result. Here the hit rate of the session, and the bytes that came over the link:",
        "",
        "```python",
        *_EXAMPLE.strip().splitlines(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _table(metrics: Sequence[Metric]) -> list[str]:
    lines = ["| figure | unit | definition | formula |", "|---|---|---|---|"]
    for metric in metrics:
        formula = f"`{metric.formula}`" if metric.formula else ""
        lines.append(f"| `{metric.name}` | {metric.unit} | {metric.definition} | {formula} |")
    return lines


def command_page() -> str:
    import argparse
    import os

    from moepic_core.cli import build_parser

    os.environ["COLUMNS"] = "100"  # so that the text does not depend on the terminal
    os.environ["NO_COLOR"] = "1"
    parser = build_parser()
    pages = [("moepic", parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            pages += [(f"moepic {name}", command) for name, command in action.choices.items()]
    lines = ["# Command line", "", "`python -m moepic_core`, made from its own help by `python docs/generate.py`.", ""]
    for title, page in pages:
        lines += [f"## {title}", "", "```", page.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


PAGES = {"METRICS.md": metrics_page, "COMMAND_LINE.md": command_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
