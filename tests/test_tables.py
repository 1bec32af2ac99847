"""Markdown of benchmark results: margins, memory and errors by hand, and every table that the documents show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import ahead, by_ratio, compared, enough, errors, margins, read, sensitivities, share_of, speeds

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MS = {"moepic": (80, 50, 40), "adapmoe": (100, 70, 30), "on-demand": (200, 200, 200)}
SHARES = (0.1667, 0.3333, 0.5)


def rows() -> list[dict[str, Any]]:
    return [
        {"strategy": name, "share": share, "ratio": 2.9, "tpot_s": ms / 1e3, "hit_rate": 0.5, "partial_hit_rate": 0.25,
         "overlap": None, "planned_over_measured": 0.8, "predicted_over_measured": 1 + ms / 1e3,
         "simulated_over_measured": 0.9, "simulated_hit_rate": 0.52, "foreseen": 0.7, "expected_foreseen": 0.69,
         "tpot_s_min": 0.9 * ms / 1e3, "tpot_s_max": 0.99 * ms / 1e3}
        for name, times in MS.items() for share, ms in zip(SHARES, times, strict=True)
    ]  # fmt: skip


def test_how_much_lower_and_how_much_memory() -> None:
    found = margins(rows())
    assert found["adapmoe"]["2.9x, 33.3 %"] == pytest.approx(1 - 50 / 70, abs=1e-4)
    assert found["adapmoe"]["2.9x, 50.0 %"] == pytest.approx(1 - 40 / 30, abs=1e-4)
    need = "share of experts for moepic's TPOT at 33 %, 2.9x"
    assert found["adapmoe"][need] == pytest.approx((0.3333 + 0.5) / 2)  # 50 lies in the middle between 70 and 30
    assert found["on-demand"][need] is None
    assert enough([row for row in rows() if row["strategy"] == "moepic"], 0.09) == 0.1667


def test_errors_count_in_both_directions() -> None:
    found = errors(rows())
    assert found["plan off by"] == {"median": 0.2, "worst": 0.2}
    assert found["prediction off by"] == {"median": 0.08, "worst": 0.2}
    assert found["replay off by"] == {"median": 0.1, "worst": 0.1}
    assert found["replay's hit rate off by"] == {"median": 0.02, "worst": 0.02}
    assert found["share foreseen off by"] == {"median": 0.01, "worst": 0.01}
    assert found["slowest round over fastest"] == {"median": 0.1, "worst": 0.1}


def test_a_comparison_in_markdown() -> None:
    lines = compared({"rows": rows()})
    assert lines[:6] == [
        "**link 2.9 × slower than compute**",
        "",
        "| cached experts, % of all bytes | 16.7 | 33.3 | 50 |",
        "|---|---|---|---|",
        "| moepic | 80.0 | 50.0 | 40.0 |",
        "| adapmoe | 100.0 (+20 %) | 70.0 (+29 %) | 30.0 (-33 %) |",
    ]
    assert "| adapmoe | 50 / 25, – | 50 / 25, – | 50 / 25, – |" in lines
    assert "| 33 | 42 | more than measured |" in lines
    assert lines[-1].startswith("plan off by: median 20.0%, worst 20.0%; prediction off by: median 8.0%")


def kept(name: str) -> dict[str, Any]:
    (path,) = RESULTS.glob(f"*-{name}.json")
    return read([path])


def shown() -> list[str]:
    return (RESULTS.parents[1] / "docs" / "RESULTS.md").read_text(encoding="utf-8").splitlines()


def test_kept_results_make_the_tables_of_the_documents() -> None:
    tables = [line for line in sensitivities(kept("sensitivity")) if line.startswith("|")]
    assert len(tables) > 40
    assert [line for line in tables if line not in shown()] == []


@pytest.mark.parametrize("name", ["compare-1", "compare-2.9", "compare-6", "compare-ablations"])
def test_kept_comparisons_make_the_tables_of_the_documents(name: str) -> None:
    found = [speeds(rows, share_of, "cached experts, % of all bytes") for rows in by_ratio(kept(name)).values()]
    assert len(found) == 1
    assert [line for table in found for line in table if line not in shown()] == []


def test_models_at_full_scale_make_the_table_of_the_documents() -> None:
    found = ahead(kept("full-scale"))
    assert len(found) == 8
    assert [line for line in found if line not in shown()] == []


def test_how_far_ahead_over_all_budgets() -> None:
    found = [
        {"model": "m", "machine": "card", "strategy": name, "budget_bytes": budget, "tpot_s": ms, "partial_hit_rate": 0}
        for name, times in MS.items() for budget, ms in enumerate(times)
    ]  # fmt: skip
    assert ahead({"rows": found})[2:] == ["| m on card | -33 to 29 | 60 to 80 | 0 |"]


def test_the_kept_comparison_with_even_routing_makes_its_table() -> None:
    """Both shares and their hits stand in one line there, with margins in brackets."""
    without_margins = [re.sub(r" \(.*?\)", "", line) for line in shown()]
    result = kept("compare-even")
    for name in dict.fromkeys(row["strategy"] for row in result["rows"]):
        cells = [
            f"{1e3 * row['tpot_s']:.1f} | {100 * row['hit_rate']:.0f} / {100 * row['partial_hit_rate']:.0f}"
            for row in result["rows"] if row["strategy"] == name
        ]  # fmt: skip
        assert f"| {name} | {' | '.join(cells)} |" in without_margins


def test_files_of_different_benchmarks_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text(json.dumps({"benchmark": name, "rows": []}), encoding="utf-8")
    with pytest.raises(AssertionError, match="different benchmarks"):
        read([tmp_path / "one", tmp_path / "other"])
