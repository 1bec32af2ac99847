"""The budget in exact numbers: what a model needs, how a user may word it, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from test_uniform import EVERYTHING, FIXED, NEEDS, RECORD

from moepic_core.budgets import budget_bytes
from moepic_core.errors import BadSettings, OutOfRoom


def test_needs_add_up() -> None:
    assert (NEEDS.record, NEEDS.fixed, NEEDS.staging_records) == (RECORD, FIXED, 4)
    assert (NEEDS.smallest, NEEDS.everything) == (FIXED + 2 * RECORD, EVERYTHING)
    assert dataclasses.replace(NEEDS, top_k=1).staging_records == 2


@pytest.mark.parametrize(
    ("vram", "free", "budget"),
    [
        ("auto", EVERYTHING - 5, EVERYTHING - 5),
        (" Auto ", 10 * EVERYTHING, EVERYTHING),
        ("100%", 0, EVERYTHING),
        ("75%", 0, int(0.75 * EVERYTHING)),
        (" 87.5 % ", 0, int(0.875 * EVERYTHING)),
        ("1.5MB", 0, 1_500_000),
        ("2MiB", 0, 2**21),
        (1_200_000, 0, 1_200_000),
        (NEEDS.smallest, 0, NEEDS.smallest),
    ],
)
def test_budgets(vram: str | int, free: int, budget: int) -> None:
    assert budget_bytes(vram, NEEDS, free) == budget


@pytest.mark.parametrize("vram", [NEEDS.smallest - 1, "1MB", "1%", 0, "auto"])
def test_a_budget_below_the_smallest_is_refused_and_names_it(vram: str | int) -> None:
    with pytest.raises(OutOfRoom) as refused:
        budget_bytes(vram, NEEDS, free_bytes=NEEDS.smallest - 1)
    assert f"the smallest is 1.1 MB ({NEEDS.smallest} bytes: weights outside the experts 900 kB, KV 90 kB, " in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("vram", ["12 parsecs", "", "GB", "-3GB", "1e9 bytes"])
def test_nonsense_units_are_refused(vram: str) -> None:
    with pytest.raises(BadSettings, match="is not understood; write a number and a unit such as 2GB"):
        budget_bytes(vram, NEEDS, free_bytes=EVERYTHING)


@pytest.mark.parametrize("vram", ["0%", "-5%", "100.1%", "%", "half%", "nan%"])
def test_nonsense_percentages_are_refused(vram: str) -> None:
    with pytest.raises(BadSettings, match="a percentage is above 0 and at most 100, such as 50%"):
        budget_bytes(vram, NEEDS, free_bytes=EVERYTHING)
