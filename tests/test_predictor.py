"""predictor.py: exact probabilities and accuracies, and the score against a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.predictor import Guess, Predictor


def test_probabilities_start_at_one_half_and_follow_the_measurement():
    predictor = Predictor(num_layers=2, max_depth=3)
    assert predictor.propose(1, [7, 4, 9]) == [Guess(7, 0, 1 / 2), Guess(4, 1, 1 / 2), Guess(9, 2, 1 / 2)]
    predictor.observe(1, {9, 7})
    assert predictor.propose(1, [1, 2, 3]) == [Guess(1, 0, 2 / 3), Guess(2, 1, 1 / 3), Guess(3, 2, 2 / 3)]
    assert predictor.propose(0, [5]) == [Guess(5, 0, 1 / 2)]  # layers learn apart


def test_probability_approaches_the_accuracy():
    predictor = Predictor(num_layers=1, max_depth=1)
    for step in range(1000):
        predictor.propose(0, [0])
        predictor.observe(0, {0} if step % 10 else {1})
    assert predictor.propose(0, [0])[0].probability == pytest.approx(0.9, abs=0.001)
    assert predictor.accuracy()[0, 0] == 0.9


def test_accuracy_is_nan_where_nothing_was_scored():
    predictor = Predictor(num_layers=2, max_depth=2)
    predictor.propose(0, [3])
    predictor.observe(0, [3])
    np.testing.assert_array_equal(predictor.accuracy(), [[1.0, np.nan], [np.nan, np.nan]])


def test_each_prediction_is_scored_once():
    predictor = Predictor(num_layers=1, max_depth=2)
    predictor.observe(0, {1})  # nothing open
    predictor.propose(0, [5, 6])
    predictor.propose(0, [1, 2])  # replaces the unobserved one
    predictor.observe(0, {1, 5})
    predictor.observe(0, {2})  # already closed
    right, total = predictor.counts()
    assert (right.tolist(), total.tolist()) == ([[1, 0]], [[1, 1]])


def test_forgotten_predictions_are_not_scored():
    predictor = Predictor(num_layers=2, max_depth=1)
    predictor.propose(0, [1])
    predictor.propose(1, [1])
    predictor.forget_open()
    predictor.observe(0, {1})
    predictor.observe(1, {1})
    assert predictor.counts()[1].sum() == 0


def test_too_many_guesses_are_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="3 guesses for layer 0, at most 2"):
        Predictor(num_layers=1, max_depth=2).propose(0, [1, 2, 3])


def test_check_names_both_sides():
    predictor = Predictor(num_layers=1, max_depth=2)
    predictor.propose(0, [4, 4])
    with pytest.raises(AssertionError, match="2 open guesses, 1 distinct"):
        predictor.check()
    predictor.forget_open()
    predictor._right[0][1] = 1
    with pytest.raises(AssertionError, match="1 right of 0"):
        predictor.check()


ranked = st.lists(st.integers(0, 9), max_size=4, unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("propose"), st.integers(0, 2), ranked),
        st.tuples(st.just("observe"), st.integers(0, 2), st.sets(st.integers(0, 9))),
        st.tuples(st.just("forget"), st.just(0), st.just([])),
    ),
    max_size=40,
)


@given(steps)
def test_against_a_slow_reference(history):
    """Walk the history backwards from each observation to find what it scores."""
    predictor = Predictor(num_layers=3, max_depth=4)
    right, total = np.zeros((3, 4), int), np.zeros((3, 4), int)
    for position, (action, layer, experts) in enumerate(history):
        if action == "propose":
            predictor.propose(layer, experts)
        elif action == "forget":
            predictor.forget_open()
        else:
            predictor.observe(layer, experts)
            earlier = [step for step in history[:position] if step[1] == layer or step[0] == "forget"]
            guesses = earlier[-1][2] if earlier and earlier[-1][0] == "propose" else []
            for rank, guess in enumerate(guesses):
                total[layer, rank] += 1
                right[layer, rank] += guess in experts
        predictor.check()
    np.testing.assert_array_equal(predictor.counts(), (right, total))
    known = total > 0
    np.testing.assert_array_equal(predictor.accuracy()[known], right[known] / total[known])
    assert np.isnan(predictor.accuracy()[~known]).all()
