"""What a workload says that tokens find, against counting by hand, and the assumptions where nothing is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toy_routing import toy_trace

from moepic_core.activation_matrices import ActivationMatrices
from moepic_core.hit_curves import ranks
from moepic_core.routing import RoutingTrace
from moepic_core.workload import assumed_trace, replay, workload

TRACE = toy_trace(3, tokens=60, layers=2, num_experts=6, top_k=3, accuracy=0.6)


@pytest.mark.parametrize("policy", ["lcp", "lru"])
@pytest.mark.parametrize("depth", [0, 2, 3])
def test_every_number_is_that_of_a_slow_count(policy: str, depth: int) -> None:
    work, found = workload(replay(TRACE, policy, "next-router"), depth), ranks(policy, TRACE)  # type: ignore[arg-type]
    assert (work.depth, work.num_tokens) == (depth, 45)  # without the first quarter
    for layer, tokens in enumerate(work.layers):
        for slots in range(7):
            result = tokens.found(np.array([slots]))
            for place, token in enumerate(range(15, 60)):
                used = TRACE.experts[token, layer].tolist()
                cached = {e for e, r in zip(used, found.experts[token, layer].tolist(), strict=True) if r < slots}
                guessed = TRACE.guesses[token, layer, :depth].tolist()
                guess_ranks = found.guesses[token, layer, :depth].tolist()
                wrong = [r for e, r in zip(guessed, guess_ranks, strict=True) if e >= 0 and e not in used]
                right = set(guessed) & set(used)
                assert result.hits[0, place] == len(cached)
                assert result.misses[0, place] == 3 - len(cached)
                assert result.guessed_hits[0, place] == len(cached & right)
                assert result.guessed_misses[0, place] == len(right - cached)
                assert result.wrong[place] == len(wrong)
                assert result.wrong_hits[0, place] == sum(0 <= rank < slots for rank in wrong)
                room = slots - len(cached) - len(set(used) - cached - right)
                assert result.admitted[0, place] == min(max(0, room), len(right - cached))


def test_tokens_that_use_fewer_experts_are_counted_as_such() -> None:
    experts = TRACE.experts.copy()
    experts[:, 1, 2] = -1
    work = workload(replay(dataclasses.replace(TRACE, experts=experts), "lru", "none"), 0)
    assert [set(layer.uses.tolist()) for layer in work.layers] == [{3}, {2}]
    assert work.layers[1].hits[-1].max() == 2


def test_skew_says_how_early_right_guesses_stand() -> None:
    """Of tokens with one right guess in three, all first: places of 1/6 in the mean; all last: 5/6, cut at 0."""
    for place, skew in ((0, 1.0), (1, 0.0), (2, 0.0)):
        guesses = np.full((40, 1, 3), -1, np.int16)
        guesses[:, 0] = [3, 4, 5]
        guesses[:, 0, place] = 0
        trace = trace_of(np.tile(np.array([0, 1, 2], np.int16), (40, 1, 1)), guesses, 6)
        assert set(workload(replay(trace, "lru", "next-router"), 3).layers[0].skew.tolist()) == {skew}
    guesses = np.tile(np.array([0, 1, 5], np.int16), (40, 1, 1))
    trace = trace_of(np.tile(np.array([0, 1, 2], np.int16), (40, 1, 1)), guesses, 6)
    skew = workload(replay(trace, "lru", "next-router"), 3).layers[0].skew.tolist()
    assert skew == pytest.approx([3 - 6 * (1 / 6 + 1 / 2) / 2] * len(skew))


def trace_of(experts: np.ndarray, guesses: np.ndarray, num_experts: int) -> RoutingTrace:  # type: ignore[type-arg]
    nothing = np.zeros(len(experts), np.int32)
    return RoutingTrace(experts, guesses, (num_experts,), nothing, nothing.astype(np.int16), ("",), "by hand")


def test_without_guesses_hits_stay() -> None:
    work = workload(replay(TRACE, "lru", "next-router"), 3)
    bare = work.without_guesses()
    assert bare.depth == 0
    for before, after in zip(work.layers, bare.layers, strict=True):
        assert np.array_equal(before.hits, after.hits)
        assert not after.guessed_hits.any() and not after.wrong_hits.any() and not after.right.any()


def test_guesses_are_completed_and_counted_for_people() -> None:
    """What the guesses are is `guesses`' business."""
    nothing = np.full_like(TRACE.guesses, -1)
    known = replay(dataclasses.replace(TRACE, guesses=nothing), "lru", "next-router", ((0.9,), (0.9,)))
    assert known.guessing == "90% of guesses right (measured at calibration)"
    assert known.ranks.guesses.shape == known.trace.guesses.shape == TRACE.guesses.shape
    assert replay(dataclasses.replace(TRACE, guesses=nothing), "lru", "none").guessing == ""
    assert replay(TRACE, "lru", "next-router").trace is TRACE


def test_matrices_guess_what_they_would_have_ranked() -> None:
    replies = np.arange(60, dtype=np.int32) // 20
    trace = dataclasses.replace(TRACE, replies=replies)
    guesses = replay(trace, "request-frequency", "activation-matrices").trace.guesses
    matrices, expected = ActivationMatrices((6, 6)), np.full((60, 2, 3), -1)
    for token in range(60):
        if token % 20 == 0:
            matrices.begin_request()
        for layer in range(2):
            matrices.observe(layer, trace.experts[token, layer].tolist())
            following = (token, 1) if layer == 0 else (token + 1, 0)
            if layer == 0 or (token + 1) % 20:
                ranked = matrices.rank(following[1])[:3]
                expected[following][: len(ranked)] = ranked
    assert np.array_equal(guesses, expected)
    assert (guesses[:20] == -1).all() and (guesses[20, 0] == -1).all() and (guesses[21:40] >= 0).all()


def test_the_assumed_trace_is_uniform_and_the_same_every_time() -> None:
    trace = assumed_trace((8, 4), 2)
    assert trace.source == "assumed: uniform routing"
    assert np.array_equal(trace.experts, assumed_trace((8, 4), 2).experts)
    assert (trace.experts[..., 0] != trace.experts[..., 1]).all() and (trace.guesses == -1).all()
    shares = np.bincount(trace.experts[:, 0].ravel(), minlength=8) / trace.experts[:, 0].size
    assert shares == pytest.approx(np.full(8, 1 / 8), abs=0.03)
