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


@pytest.mark.parametrize(
    ("curves", "allocations"),
    [
        (CONVEX, {0: [0, 0, 0], 1: [1, 0, 0], 3: [2, 1, 0], 5: [3, 2, 0], 12: [3, 4, 0]}),  # the third gains nothing
        (CLIFFS, {0: [0, 0, 0], 2: [0, 2, 0], 3: [3, 0, 0], 5: [3, 2, 0], 12: [3, 4, 4]}),  # all or nothing
        (CONVEX[:1], {0: [0], 2: [2], 9: [3]}),
        (CLIFFS[:1], {2: [0], 3: [3], 4: [3]}),
        (CONVEX[2:], {0: [0], 4: [0]}),
    ],
)
def test_steps_go_where_they_help_most(curves: NDArray[np.float64], allocations: dict[int, list[int]]) -> None:
    found, _ = fixed_point(curves, np.array(list(allocations)))
    assert found.tolist() == list(allocations.values())
    for total, allocation in allocations.items():
        assert dynamic_program(curves, total).tolist() == allocation
        assert cost(curves, np.array(allocation)) == exhaustive(curves, total)


@pytest.mark.parametrize(
    ("curves", "total", "start", "end"),
    [
        # Steepest first, the cliff does not fit; a wider move brings all steps of the second layer there.
        ([[9.0, 9, 9, 0], [5, 1, 1, 0]], 3, [0, 1], [3, 0]),
        # The better move takes the two steps that nobody has, and one of the first layer's two.
        ([[8.0, 7, 0, 0], [11, 11, 10, 0.5]], 4, [2, 0], [1, 3]),
        ([[8.0, 7, 0, 0], [7, 7, 7, 0.5]], 4, [2, 0], [2, 0]),
    ],
)
def test_moves_cross_what_is_not_convex(
    curves: list[list[float]], total: int, start: list[int], end: list[int]
) -> None:
    found, moves = fixed_point(np.array(curves), np.array([total]))
    assert found.tolist() == [end]
    assert (moves > 0) == (start != end)
    assert cost(np.array(curves), found[0]) == exhaustive(np.array(curves), total)


def falls(layers: int, steps: int = 4) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 20), min_size=steps, max_size=steps), min_size=1, max_size=layers)


def curves_of(steps: list[list[int]]) -> NDArray[np.float64]:
    fallen = np.array(steps, float).cumsum(axis=1)
    return np.concatenate((np.zeros((len(steps), 1)), -fallen), axis=1) + fallen[:, -1:]


@given(falls(4), st.integers(0, 20))
def test_the_dynamic_program_is_exact(steps: list[list[int]], total: int) -> None:
    curves = curves_of(steps)
    allocation = dynamic_program(curves, total)
    assert allocation.sum() <= total
    assert cost(curves, allocation) == exhaustive(curves, total)


@given(falls(2, steps=7), st.lists(st.integers(0, 15), min_size=1, max_size=4))
def test_moves_are_exact_for_two_layers(steps: list[list[int]], totals: list[int]) -> None:
    """Any curves: where two layers could share better, one move brings them there."""
    curves = curves_of(steps)
    found, _ = fixed_point(curves, np.array(totals))
    for total, allocation in zip(totals, found, strict=True):
        assert allocation.sum() <= total
        assert cost(curves, allocation) == exhaustive(curves, total)


@given(falls(4), st.integers(0, 20))
def test_moves_are_exact_where_each_step_helps_less_than_the_one_before(steps: list[list[int]], total: int) -> None:
    curves = curves_of([sorted(own, reverse=True) for own in steps])
    found, moves = fixed_point(curves, np.array([total]))
    assert cost(curves, found[0]) == exhaustive(curves, total)
    assert moves == 0, "the start is not the optimum"


@given(falls(4), st.integers(0, 20))
def test_a_fixed_point_cannot_be_improved_by_a_move(steps: list[list[int]], total: int) -> None:
    curves = curves_of(steps)
    (found,), _ = fixed_point(curves, np.array([total]))
    assert 0 <= found.min() <= found.max() <= 4 and found.sum() <= total
    free = total - int(found.sum())
    for receiver, span in itertools.product(range(len(curves)), range(1, 5)):
        for giver in range(len(curves)):
            moved = found.copy()
            moved[giver] -= max(0, span - free)
            moved[receiver] += span
            if moved.min() >= 0 and moved.max() <= 4 and moved.sum() <= total:
                assert cost(curves, moved) >= cost(curves, found)


def test_random_cliffs_are_shared_almost_as_by_the_dynamic_program() -> None:
    """200 cases of curves with a few high cliffs, far less convex than any model's: 1 % in all but a few."""
    generator, excess = np.random.default_rng(0), []
    for _ in range(200):
        num_layers, width = int(generator.integers(3, 9)), int(generator.integers(3, 25))
        heights = generator.exponential(1, (num_layers, width)) * (generator.random((num_layers, width)) < 0.3)
        curves = heights.sum() / num_layers / 3 + heights[:, ::-1].cumsum(axis=1)[:, ::-1]
        total = int(generator.integers(1, width * num_layers))
        (found,), _ = fixed_point(curves, np.array([total]))
        excess.append(cost(curves, found) / cost(curves, dynamic_program(curves, total)) - 1)
    assert np.mean(excess) < 5e-4 and np.quantile(excess, 0.99) <= 0.01
    assert max(excess) <= 0.02
