"""What `benchmarks/results` promises: every file is one JSON object that says how it came about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_one_object_that_says_how_it_came_about(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"benchmark", "command", "commit", "date"} <= result.keys()
    assert result["command"].startswith(f"python -m benchmarks.{result['benchmark']}")
    assert " /" not in result["command"]  # where things lie on one machine is nobody's business
