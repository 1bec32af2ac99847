"""Synthetic traces: what is stated is what comes out, the same every time, and near what was published."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepic_core.errors import BadSettings
from moepic_core.presets import MODELS
from moepic_core.routing import RoutingTrace
from moepic_core.synthetic import HABITS, Habits, hit_rate, synthesize, trace_for

PLAIN = Habits(
    popularity=0.0, locality=0.0, memory_tokens=16, subject_share=0.0, subject_tokens=200, num_subjects=2,
    reply_tokens=100, middle_accuracy=0.9, end_accuracy=0.4,
)  # fmt: skip
QWEN = HABITS["qwen1.5-moe-a2.7b"]


def uses(trace: RoutingTrace, layer: int = 0, tokens: slice = slice(None)) -> np.ndarray:
    """How often each expert was used."""
    return np.bincount(trace.experts[tokens, layer].ravel(), minlength=trace.num_experts[layer])


def right(trace: RoutingTrace) -> np.ndarray:
    """[layers, depth], share of right guesses."""
    return (trace.guesses[..., None] == trace.experts[:, :, None, :]).any(axis=3).mean(axis=0)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), num_layers=st.integers(1, 4), top_k=st.integers(1, 4), spare=st.integers(0, 20),
    locality=st.floats(0, 1), popularity=st.floats(0, 2),
)  # fmt: skip
def test_every_trace_is_one_that_a_router_could_have_made(
    seed: int, num_layers: int, top_k: int, spare: int, locality: float, popularity: float
) -> None:
    habits, num_experts = replace(PLAIN, locality=locality, popularity=popularity), 2 * top_k + spare
    trace = synthesize(habits, num_layers, num_experts, top_k, 20, seed)
    assert trace.experts.shape == trace.guesses.shape == (20, num_layers, top_k)
    for lists in (trace.experts, trace.guesses):
        assert lists.min() >= 0
        assert lists.max() < num_experts
        assert (np.diff(np.sort(lists, axis=2), axis=2) > 0).all()


def test_the_same_seed_gives_the_same_trace() -> None:
    first, again, other = (synthesize(QWEN, 2, 60, 4, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.experts, again.experts)
    assert np.array_equal(first.guesses, again.guesses)
    assert not np.array_equal(first.experts, other.experts)
    assert first.source == "synthetic: a model, popularity 0.45, locality 0.6, seed 1"


def test_popularity_is_zipfs() -> None:
    """One draw per token: the n-th expert comes n ** -1 as often as the first."""
    trace = synthesize(replace(PLAIN, popularity=1.0), 1, 8, 1, 5000)
    found = np.sort(uses(trace))[::-1] / 5000
    stated = 1 / np.arange(1, 9)
    np.testing.assert_allclose(found, stated / stated.sum(), atol=0.02)
    even = uses(synthesize(PLAIN, 1, 8, 2, 5000)) / 10000
    np.testing.assert_allclose(even, 1 / 8, atol=0.015)


def test_locality_repeats_what_recent_tokens_used() -> None:
    def repeated(locality: float) -> float:
        trace = synthesize(replace(PLAIN, locality=locality, memory_tokens=1), 1, 16, 1, 4000)
        return float((trace.experts[1:] == trace.experts[:-1]).mean())

    assert repeated(0.0) == pytest.approx(1 / 16, abs=0.015)
    # The token before has 1 − 1/e of what is remembered.
    assert repeated(0.5) == pytest.approx(0.5 * (1 - np.exp(-1)) + 1 / 16, abs=0.05)


def test_subjects_change_who_is_popular_and_come_back() -> None:
    habits = replace(PLAIN, popularity=1.5, subject_tokens=1000)
    for share, alike in ((0.0, True), (1.0, False)):
        trace = synthesize(replace(habits, subject_share=share), 1, 32, 2, 3000)
        first, second, again = (uses(trace, 0, slice(start, start + 1000)) for start in (0, 1000, 2000))
        assert (np.corrcoef(first, second)[0, 1] > 0.9) == alike
        assert np.corrcoef(first, again)[0, 1] > 0.9
    assert trace.subjects[[0, 999, 1000, 2000]].tolist() == [0, 0, 1, 0]
    assert trace.replies[[0, 99, 100, 2999]].tolist() == [0, 0, 1, 29]
    assert trace.subject_names == ("subject 1", "subject 2")


def test_guesses_are_good_in_the_middle_and_for_the_first_ranks() -> None:
    found = right(synthesize(PLAIN, 9, 32, 4, 2000))
    by_layer = found.mean(axis=1)
    assert by_layer[4] == pytest.approx(0.9, abs=0.01)
    assert by_layer[[0, 8]] == pytest.approx(0.4 + 0.5 * np.sin(np.pi / 18), abs=0.02)
    assert (np.diff(by_layer[:5]) > 0).all()
    assert (np.diff(by_layer[4:]) < 0).all()
    np.testing.assert_allclose(found.mean(axis=0) - found.mean(), [0.0375, 0.0125, -0.0125, -0.0375], atol=0.01)


def test_qwen_hits_as_published() -> None:
    """30 of 60 experts cached (arXiv 2509.08342). Its random choice of cached experts hits a half of any trace."""
    trace = synthesize(QWEN, 3, 60, 4, 3000)
    found = {policy: 100 * hit_rate(trace, policy, 30) for policy in ("lru", "lfu", "lcp")}
    assert found == pytest.approx({"lru": 56.38, "lfu": 60.68, "lcp": 62.21}, abs=2.0)
    assert found["lru"] < found["lfu"] <= found["lcp"] + 0.1


def test_guesses_for_presets_are_as_often_right_as_stated() -> None:
    found = right(trace_for(MODELS["qwen3-30b-a3b"], 200)).mean()
    assert found == pytest.approx(0.79, abs=0.01)


def test_mixtral_uses_its_experts_about_evenly_and_often_again() -> None:
    trace = trace_for(MODELS["mixtral-8x7b"], 2000)
    assert (uses(trace, 5) > 0.1 * 4000).all()
    again = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(axis=(2, 3)).mean()
    assert 0.55 < again < 0.65  # at random 1 − 6/8 · 5/7 = 0.46


def fit_locality(wanted: float, num_layers: int, tokens: int) -> float:
    """The locality, to 1/64, at which LCP with 30 of 60 experts hits `wanted`. More locality hits more."""
    low, high = 0, 64
    while high - low > 1:
        middle = (low + high) // 2
        made = synthesize(replace(QWEN, locality=middle / 64), num_layers, 60, 4, tokens)
        low, high = (middle, high) if hit_rate(made, "lcp", 30) < wanted else (low, middle)
    return low / 64


def test_the_stated_locality_is_the_one_that_hits_as_published() -> None:
    assert fit_locality(0.6221, num_layers=3, tokens=3000) == pytest.approx(QWEN.locality, abs=0.05)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(BadSettings, match="needs 8 experts for top-4, got 7"):
        synthesize(QWEN, 1, 7, 4, 10)


def test_every_preset_has_habits() -> None:
    assert set(HABITS) == set(MODELS)
