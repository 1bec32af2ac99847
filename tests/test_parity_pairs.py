"""Exactness over all pairs: any two values of family, split, budget, strategy, link and eviction meet in some case.

A case answers 16 tokens greedily, and its logits agree with Transformers' `eager`. `test_parity` varies splits, budgets
and strategies fully over one link; here is what any two settings do to each other. The table is made by rule, so a new
strategy or eviction policy joins it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import get_args

import pytest
from test_parity import NAMED, PROMPT, TOLERANCE, Reference, load, references  # noqa: F401

from moepic_core.engine import Engine
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, EvictionName

NEW_TOKENS = 16
BUDGETS = {"smallest": 0.0, "a third": 1 / 3, "half": 0.5, "everything": 1.0}  # of what lies above the smallest
VALUES: dict[str, tuple[object, ...]] = {
    "family": NAMED,
    "link": ("emulated:20GB/s", "emulated:20MB/s", "disk"),
    "strategy": tuple(STRATEGIES),
    "eviction": get_args(EvictionName),
    "split": (0.0, 0.3, 0.5, 1.0),
    "budget": tuple(BUDGETS),
}
Case = tuple[object, ...]  # a value for each key of VALUES


def pairs_of(case: Case) -> set[tuple[int, object, int, object]]:
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def all_pairs() -> set[tuple[int, object, int, object]]:
    columns = list(enumerate(VALUES.values()))
    return {(i, a, j, b) for (i, one), (j, other) in combinations(columns, 2) for a, b in product(one, other)}


@cache
def table() -> list[Case]:
    """Cases that cover all pairs, greedily: each begins with a pair that is missing and takes in as many as it can."""
    missing, cases = all_pairs(), []
    columns = list(VALUES.values())
    while missing:
        i, a, j, b = min(missing, key=repr)
        chosen = {i: a, j: b}
        for column in range(len(columns)):
            if column not in chosen:
                gained = {value: _gained(missing, chosen, column, value) for value in columns[column]}
                chosen[column] = max(gained, key=gained.__getitem__)
        case = tuple(chosen[column] for column in range(len(columns)))
        cases.append(case)
        missing -= pairs_of(case)
    return sorted(cases, key=repr)


def _gained(
    missing: set[tuple[int, object, int, object]], chosen: dict[int, object], column: int, value: object
) -> int:
    """Missing pairs that `value` makes with what has been chosen."""
    ends = ((other, there) for other, there in chosen.items())
    return sum(
        ((other, there, column, value) if other < column else (column, value, other, there)) in missing
        for other, there in ends
    )


def assert_same(engine: Engine, reference: Reference, case: Case) -> None:
    engine.hf.forget()
    engine.residency.begin_pass(len(PROMPT))
    logits = engine.hf.forward(PROMPT, all_logits=True)
    engine.residency.end_pass()
    error = float((logits - reference.logits).abs().max() / reference.logits.abs().max())
    assert error <= TOLERANCE, f"{case}: largest relative difference {error:.2e}, allowed {TOLERANCE}"
    engine.hf.forget()
    *_, done = engine.generate(PROMPT, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    assert isinstance(done, Done)
    assert list(done.token_ids) == reference.tokens[:NEW_TOKENS], case
    engine.check()


def test_the_table_has_every_pair_in_few_cases() -> None:
    cases = table()
    assert set().union(*map(pairs_of, cases)) == all_pairs()
    fewest = len(NAMED) * len(STRATEGIES)  # the two longest columns
    assert fewest <= len(cases) <= 1.3 * fewest


@pytest.mark.parametrize("family", NAMED)
def test_every_pair_of_settings_answers_like_eager(
    family: str,
    checkpoints: Callable[..., Path],
    references: Callable[[str], Reference],  # noqa: F811
    tmp_path: Path,
) -> None:
    for link in VALUES["link"]:
        with load(checkpoints(family), tmp_path, link=link) as engine:
            smallest, everything = engine.needs.smallest, engine.needs.everything
            for case in table():
                if case[:2] != (family, link):
                    continue
                _, _, strategy, eviction, split, budget = case
                vram = smallest + int(BUDGETS[str(budget)] * (everything - smallest))
                engine.reconfigure(vram=vram, split=split, strategy=strategy, eviction=eviction)
                assert (engine.plan.eviction, engine.plan.memory.budget) == (eviction, vram)
                assert_same(engine, references(family), case)
