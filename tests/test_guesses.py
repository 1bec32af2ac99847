"""Guesses that a trace lacks: how often they are right, where that comes from, and what is never made up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_routing import toy_trace

from moepic_core.guesses import accuracies, completed
from moepic_core.routing import RoutingTrace

TRACE = toy_trace(5, tokens=600, layers=3, num_experts=8, top_k=3, accuracy=0.8)


def without(trace: RoutingTrace, tokens: slice, layers: slice = slice(None)) -> RoutingTrace:
    guesses = trace.guesses.copy()
    guesses[tokens, layers] = -1
    return dataclasses.replace(trace, guesses=guesses)


def share_right(trace: RoutingTrace, layer: int, ranks: slice = slice(None)) -> float:
    guesses = trace.guesses[:, layer, ranks]
    right = (guesses[..., :, None] == trace.experts[:, layer, None, :]).any(axis=2)
    return float(right[guesses >= 0].mean())


def test_what_is_recorded_stays() -> None:
    same, words = completed(TRACE, ((0.1,),) * 3)
    assert same is TRACE
    right = np.mean([share_right(TRACE, layer) for layer in range(3)])
    assert words == f"{right:.0%} of guesses right ({TRACE.source})"


def test_nothing_known_is_assumed_to_be_half_right() -> None:
    full, words = completed(without(TRACE, slice(None)))
    assert words.endswith("of guesses right (assumed)")
    assert [share_right(full, layer) for layer in range(3)] == pytest.approx([0.5] * 3, abs=0.04)


def test_calibration_says_it_for_each_layer_and_rank() -> None:
    measured = ((0.9, 0.5), (), (0.2, 0.2, 0.8))  # the last rank stands for those below it
    full, words = completed(without(TRACE, slice(None)), measured)
    assert words.endswith("of guesses right (measured at calibration, assumed)")
    for layer, wanted in ((0, (0.9, 0.5, 0.5)), (1, (0.5, 0.5, 0.5)), (2, (0.2, 0.2, 0.8))):
        found = [share_right(full, layer, slice(rank, rank + 1)) for rank in range(3)]
        assert found == pytest.approx(wanted, abs=0.07)


def test_recorded_guesses_stand_for_the_same_layer_only() -> None:
    """Two thirds of the tokens lack guesses in layer 0, all in layer 1, none in layer 2."""
    partly = without(without(TRACE, slice(200, None), slice(0, 1)), slice(None), slice(1, 2))
    full, words = completed(partly, ((0.1,), (0.3,), (0.1,)))
    assert words.endswith(f"of guesses right ({TRACE.source}, measured at calibration)")
    assert np.array_equal(full.guesses[:200, 0], TRACE.guesses[:200, 0])
    assert np.array_equal(full.guesses[:, 2], TRACE.guesses[:, 2])
    assert share_right(full, 0) == pytest.approx(share_right(TRACE, 0), abs=0.06)
    assert share_right(full, 1) == pytest.approx(0.3, abs=0.05)


def test_a_few_recorded_guesses_say_too_little() -> None:
    full, _ = completed(without(TRACE, slice(31, None)), ((0.1,),) * 3)
    assert share_right(full, 0) < 0.2
    full, words = completed(without(TRACE, slice(32, None)), ((0.1,),) * 3)
    assert share_right(full, 0) > 0.6
    assert "calibration" not in words


def test_nobody_guesses_the_first_layer_of_a_reply() -> None:
    replies = np.arange(600, dtype=np.int32) // 100
    bare = without(dataclasses.replace(TRACE, replies=replies), slice(None))
    full, _ = completed(bare)
    made = (full.guesses >= 0).any(axis=2)
    assert np.flatnonzero(~made[:, 0]).tolist() == [0, 100, 200, 300, 400, 500]
    assert made[:, 1:].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.floats(0, 1))
def test_made_up_guesses_are_experts_and_none_comes_twice(seed: int, count: int, top_k: int, accuracy: float) -> None:
    """Also where all experts are used and wrong guesses run out, and where a token uses fewer than others."""
    generator = np.random.default_rng(seed)
    top_k = min(top_k, count)
    experts = generator.random((20, 2, count)).argsort(axis=2)[..., :top_k].astype(np.int16)
    experts[generator.random((20, 2)) < 0.2, top_k - 1] = -1
    nothing = np.zeros(20, np.int16)
    trace = RoutingTrace(
        experts, np.full((20, 2, 0), -1, np.int16), (count, count), nothing.astype(np.int32), nothing, ("",), "by hand"
    )
    full, _ = completed(trace, ((accuracy,),) * 2)
    again, _ = completed(trace, ((accuracy,),) * 2)
    assert np.array_equal(full.guesses, again.guesses)
    for used, guesses in zip(experts.reshape(-1, top_k), full.guesses.reshape(-1, top_k), strict=True):
        made = guesses[guesses >= 0]
        assert len(set(made.tolist())) == len(made) <= (used >= 0).sum()
        assert (made < count).all()


def test_accuracy_is_laplace_s_of_ranks_that_were_guessed() -> None:
    right, total = np.array([[9, 4, 0], [0, 0, 0]]), np.array([[10, 10, 0], [0, 0, 0]])
    assert accuracies(right, total) == ((10 / 12, 5 / 12), ())
