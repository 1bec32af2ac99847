"""Moves and dynamic program against every possible allocation, and what a fixed point promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moepic_core.allocation import dynamic_program, fixed_point

CONVEX = np.array([[9.0, 5, 2, 1, 1], [8, 6, 5, 4.5, 4.25], [3, 3, 3, 3, 3]])
CLIFFS = np.array([[9.0, 9, 9, 0, 0], [5, 4, 3, 2.5, 2.25], [5, 4.5, 4, 3.75, 3.5]])


def cost(curves: NDArray[np.float64], allocation: NDArray[np.int64]) -> float:
    return float(curves[np.arange(len(curves)), allocation].sum())


def exhaustive(curves: NDArray[np.float64], total: int) -> float:
    choices = itertools.product(*(range(curves.shape[1]) for _ in curves))
    return min(cost(curves, np.array(choice)) for choice in choices if sum(choice) <= total)


def nothing(curves: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.zeros(len(curves), np.int64)


@pytest.mark.parametrize(
    ("curves", "total", "allocation", "moves"),
    [
        (CONVEX, 0, [0, 0, 0], 0),
        (CONVEX, 1, [1, 0, 0], 1),
        (CONVEX, 3, [2, 1, 0], 3),
        (CONVEX, 12, [3, 4, 0], 7),  # the third layer gains nothing and gets nothing
        (CLIFFS, 2, [0, 2, 0], 2),
        (CLIFFS, 3, [3, 0, 0], 1),  # a jump of three
        (CLIFFS, 5, [3, 2, 0], 3),
    ],
)
def test_steps_go_where_they_help_most(
    curves: NDArray[np.float64], total: int, allocation: list[int], moves: int
) -> None:
    found, num_moves = fixed_point(curves, nothing(curves), total)
    assert (found.tolist(), num_moves) == (allocation, moves)
    assert cost(curves, dynamic_program(curves, total)) == cost(curves, found) == exhaustive(curves, total)


@pytest.mark.parametrize(
    ("start", "kind"),
    [([0, 3, 0], "all from one"), ([1, 1, 1], "one from each"), ([2, 0, 1], "the last one")],
)
def test_a_cliff_is_crossed_with_the_steps_of_others(start: list[int], kind: str) -> None:
    found, _ = fixed_point(CLIFFS, np.array(start), 0)
    assert found.tolist() == [3, 0, 0], kind


def test_one_layer_gives_its_steps_to_several() -> None:
    curves = np.array([[4.0, 4, 4, 0], [9, 2, 2, 2], [9, 2, 2, 2], [9, 2, 2, 2]])
    found, _ = fixed_point(curves, np.array([3, 0, 0, 0]), 0)
    assert found.tolist() == [0, 1, 1, 1]


falls = st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4)


def curves_of(steps: list[list[int]]) -> NDArray[np.float64]:
    fallen = np.array(steps, float).cumsum(axis=1)
    return np.concatenate((np.zeros((len(steps), 1)), -fallen), axis=1) + fallen[:, -1:]


@given(falls, st.integers(0, 20))
def test_the_dynamic_program_is_exact(steps: list[list[int]], total: int) -> None:
    curves = curves_of(steps)
    allocation = dynamic_program(curves, total)
    assert allocation.sum() <= total
    assert cost(curves, allocation) == exhaustive(curves, total)


@given(falls, st.integers(0, 20))
def test_a_fixed_point_cannot_be_improved_by_a_move(steps: list[list[int]], total: int) -> None:
    curves = curves_of(steps)
    start = np.minimum(total // len(curves), 4) * np.ones(len(curves), np.int64)
    found, _ = fixed_point(curves, start, total - int(start.sum()))
    assert 0 <= found.min() <= found.max() <= 4 and found.sum() <= total
    for giver, receiver in itertools.permutations(range(len(curves)), 2):
        for span in range(1, 5):
            if found[giver] >= span and found[receiver] + span <= 4:
                moved = found.copy()
                moved[giver] -= span
                moved[receiver] += span
                assert cost(curves, moved) >= cost(curves, found)


@given(falls, st.integers(0, 20))
def test_moves_are_exact_where_each_step_helps_less_than_the_one_before(steps: list[list[int]], total: int) -> None:
    curves = curves_of([sorted(own, reverse=True) for own in steps])
    found, _ = fixed_point(curves, nothing(curves), total)
    assert cost(curves, found) == cost(curves, dynamic_program(curves, total))
