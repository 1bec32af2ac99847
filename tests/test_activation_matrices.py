"""activation_matrices.py: exact rankings for hand-made requests, the likeness kept against one computed anew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepic_core.activation_matrices import ActivationMatrices


def tell(matrices, request):
    """A request as a list of (layer, experts)."""
    matrices.begin_request()
    for layer, experts in request:
        matrices.observe(layer, experts)


CODE = [(0, [0, 1]), (1, [2, 3]), (0, [0, 2]), (1, [3, 0])]
POEMS = [(0, [4, 5]), (1, [1, 5]), (0, [4, 3]), (1, [5, 4])]


def test_the_request_most_alike_answers():
    matrices = ActivationMatrices([6, 6])
    tell(matrices, CODE)
    tell(matrices, POEMS)
    tell(matrices, [(0, [0, 5])])  # half of each, and half of each is expert 0's and 5's: code used 0 twice
    assert matrices.rank(1) == [3, 0, 2]
    assert matrices.rank(0) == [0, 1, 2]
    matrices.observe(1, [5, 1])
    assert matrices.rank(1) == [5, 1, 4]


def test_nothing_is_guessed_before_the_second_request():
    matrices = ActivationMatrices([6, 6])
    assert matrices.rank(0) == []
    tell(matrices, CODE)
    assert matrices.rank(0) == []
    matrices.begin_request()
    assert matrices.rank(0) == [0, 1, 2]


def test_layers_count_alike_however_many_tokens_they_saw():
    """Cosines are taken layer by layer: agreement in two layers beats a bigger number in one."""
    matrices = ActivationMatrices([4, 4, 4])
    tell(matrices, [(0, [0])] * 100 + [(1, [0]), (2, [0])])
    tell(matrices, [(0, [1]), (1, [1]), (2, [1])])
    tell(matrices, [(0, [0])] * 100 + [(1, [1]), (2, [1])])
    assert matrices.rank(0) == [1]


def test_an_empty_request_is_not_filed():
    matrices = ActivationMatrices([4], max_matrices=1)
    tell(matrices, [(0, [2])])
    tell(matrices, [(0, [])])
    matrices.begin_request()
    matrices.check()
    assert matrices.rank(0) == [2]


def test_a_full_collection_gives_up_what_is_most_alike():
    matrices = ActivationMatrices([6, 6], max_matrices=2)
    tell(matrices, CODE)
    tell(matrices, POEMS)
    tell(matrices, [(0, [0]), (1, [0, 3])])  # replaces CODE
    tell(matrices, [(0, [4])])
    assert matrices.rank(1) == [5, 1, 4]
    matrices.check()
    tell(matrices, [(0, [0])])  # the request about 4 replaced POEMS
    assert matrices.rank(1) == [0, 3]
    matrices.check()


def test_check_names_both_sides():
    matrices = ActivationMatrices([4])
    tell(matrices, [(0, [2])])
    tell(matrices, [(0, [2])])
    matrices._products[0, 0] = 3
    with pytest.raises(AssertionError, match=r"products \[\[3"):
        matrices.check()


NUM_EXPERTS = (5, 3)
steps = st.lists(
    st.one_of(
        st.just("begin"),
        st.tuples(st.just(0), st.sets(st.integers(0, 4), max_size=3)),
        st.tuples(st.just(1), st.sets(st.integers(0, 2), max_size=3)),
    ),
    max_size=40,
)


def most_like(past, current):
    """The place of the past matrix with the largest sum over layers of cosines, by the textbook."""
    totals = []
    for matrix in past:
        lengths = [(np.sqrt(a @ a), np.sqrt(b @ b)) for a, b in zip(matrix, current, strict=True)]
        products = [a @ b for a, b in zip(matrix, current, strict=True)]
        totals.append(sum(p / (a * b) if a * b else 0.0 for p, (a, b) in zip(products, lengths, strict=True)))
    return totals.index(max(totals))


@settings(deadline=None)
@given(history=steps, max_matrices=st.integers(1, 3))
def test_against_a_slow_reference(history, max_matrices):
    matrices = ActivationMatrices(NUM_EXPERTS, max_matrices)
    past, current = [], np.zeros((2, 5))
    for step in history:
        if step == "begin":
            matrices.begin_request()
            if current.any():
                place = most_like(past, current) if len(past) == max_matrices else len(past)
                past[place : place + 1] = [current]
            current = np.zeros((2, 5))
        else:
            layer, experts = step
            matrices.observe(layer, experts)
            current[layer, list(experts)] += 1
        matrices.check()
        for layer in range(2):
            row = past[most_like(past, current)][layer] if past else np.zeros(5)
            assert matrices.rank(layer) == sorted(np.flatnonzero(row), key=lambda expert, row=row: -row[expert])
