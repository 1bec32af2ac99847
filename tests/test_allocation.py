"""The dynamic program against every possible allocation, and against the moves of the paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moepic_core.allocation import dynamic_program

CONVEX = np.array([[9.0, 5, 2, 1, 1], [8, 6, 5, 4.5, 4.25], [3, 3, 3, 3, 3]])
CLIFFS = np.array([[9.0, 9, 9, 0, 0], [5, 4, 3, 2.5, 2.25], [5, 4.5, 4, 3.75, 3.5]])


def cost(curves: NDArray[np.float64], allocation: NDArray[np.int64]) -> float:
    return float(curves[np.arange(len(curves)), allocation].sum())


def exhaustive(curves: NDArray[np.float64], total: int) -> float:
    choices = itertools.product(*(range(curves.shape[1]) for _ in curves))
    return min(cost(curves, np.array(choice)) for choice in choices if sum(choice) <= total)


def paper_moves(curves: NDArray[np.float64], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Single steps from the layer that is hurt least to the layer that is helped most, as long as that helps."""
    allocation, layers = start.copy(), np.arange(len(curves))
    while True:
        here = curves[layers, allocation]
        gain = here - curves[layers, np.minimum(allocation + 1, curves.shape[1] - 1)]
        loss = np.where(allocation > 0, curves[layers, np.maximum(allocation - 1, 0)] - here, np.inf)
        receiver = int(gain.argmax())
        loss[receiver] = np.inf
        giver = int(loss.argmin())
        if gain[receiver] - loss[giver] <= 1e-12:
            return allocation
        allocation[receiver] += 1
        allocation[giver] -= 1


@pytest.mark.parametrize(
    ("curves", "allocations"),
    [
        (CONVEX, {0: [0, 0, 0], 1: [1, 0, 0], 3: [2, 1, 0], 5: [3, 2, 0], 12: [3, 4, 0]}),  # the third gains nothing
        (CLIFFS, {2: [0, 2, 0], 3: [3, 0, 0], 5: [3, 2, 0], 12: [3, 4, 4]}),  # all or nothing for the first
        (CONVEX[:1], {0: [0], 2: [2], 9: [3]}),
    ],
)
def test_steps_go_where_they_help_most(curves: NDArray[np.float64], allocations: dict[int, list[int]]) -> None:
    found = dynamic_program(curves, np.array(list(allocations)))
    assert found.tolist() == list(allocations.values())


falls = st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4)


def curves_of(steps: list[list[int]]) -> NDArray[np.float64]:
    fallen = np.array(steps, float).cumsum(axis=1)
    return np.concatenate((np.zeros((len(steps), 1)), -fallen), axis=1) + fallen[:, -1:]


@given(falls, st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_it_is_exact_for_every_total(steps: list[list[int]], totals: list[int]) -> None:
    curves = curves_of(steps)
    found = dynamic_program(curves, np.array(totals))
    for total, allocation in zip(totals, found, strict=True):
        assert allocation.sum() <= total
        assert cost(curves, allocation) == exhaustive(curves, total)


@given(falls, st.integers(0, 4))
def test_where_each_step_helps_less_than_the_one_before_the_papers_moves_end_there_too(
    steps: list[list[int]], share: int
) -> None:
    curves = curves_of([sorted(own, reverse=True) for own in steps])
    moved = paper_moves(curves, np.full(len(curves), share))
    exact = dynamic_program(curves, np.array([share * len(curves)]))[0]
    assert cost(curves, moved) == cost(curves, exact)


def test_a_cliff_stops_the_papers_moves() -> None:
    assert paper_moves(CLIFFS, np.array([1, 1, 1])).tolist() == [0, 2, 1]
    assert dynamic_program(CLIFFS, np.array([3])).tolist() == [[3, 0, 0]]
