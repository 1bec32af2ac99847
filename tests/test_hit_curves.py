"""hit_curves.py: every rank against a replay of the engine's rules, Belady against exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepic_core.errors import BadSettings
from moepic_core.eviction import make_policy
from moepic_core.hit_curves import belady_hits, hit_curve, ranks
from moepic_core.routing import RoutingTrace

SOME = settings(max_examples=50, deadline=None)
POLICIES = ("lcp", "lcp-aged", "lru", "lfu", "request-frequency")


def trace_of(experts, num_experts, guesses=None, replies=None):
    """`experts` and `guesses` as nested lists [tokens, layers, k]."""
    experts = np.array(experts, np.int16)
    tokens, layers, _ = experts.shape
    return RoutingTrace(
        experts=experts,
        guesses=np.array(guesses if guesses is not None else np.empty((tokens, layers, 0)), np.int16),
        num_experts=tuple(num_experts),
        replies=np.array(replies if replies is not None else np.zeros(tokens), np.int32),
        subjects=np.zeros(tokens, np.int16),
        subject_names=("",),
        source="test",
    )


def one_layer(experts, num_experts):
    return trace_of([[row] for row in experts], [num_experts])


def replay(name, experts, num_slots, num_experts, replies):
    """Which activations of one layer hit, by the rules of `residency` in decode, one cache size at a time."""
    policy, cache, hits, reply = make_policy(name, num_experts), set(), [], None
    for now, row in enumerate(experts):
        if replies[now] != reply:
            policy.begin_request()
            reply = replies[now]
        used = [expert for expert in row if expert >= 0]
        for expert in used:
            policy.touch(expert, now)
        hits.append([expert in cache for expert in row])
        for expert in (expert for expert in used if expert not in cache):
            candidates = cache.difference(used)
            if len(cache) == num_slots and candidates:
                cache.remove(policy.victim(candidates, now))
            if len(cache) < num_slots:
                cache.add(expert)
    return hits


@st.composite
def traces(draw, max_tokens=14):
    """Two layers of unlike size, tokens that use up to three experts, a few requests."""
    sizes = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))

    def row(num_experts):
        used = draw(st.lists(st.integers(0, num_experts - 1), unique=True, max_size=3))
        return draw(st.permutations([*used, *[-1] * (3 - len(used))]))

    tokens = draw(st.integers(1, max_tokens))
    return trace_of(
        [[row(size) for size in sizes] for _ in range(tokens)],
        sizes,
        [[row(size) for size in sizes] for _ in range(tokens)],
        np.cumsum(draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens))),
    )


@pytest.mark.parametrize("name", POLICIES)
@SOME
@given(trace=traces())
def test_a_rank_says_which_sizes_hit(name, trace):
    """For all policies, all sizes down to none, tokens with any number of experts."""
    found = ranks(name, trace).experts
    for layer, num_experts in enumerate(trace.num_experts):
        experts = trace.experts[:, layer]
        for num_slots in range(num_experts + 1):
            wanted = replay(name, experts.tolist(), num_slots, num_experts, trace.replies)
            hits = (found[:, layer] >= 0) & (found[:, layer] < num_slots)
            np.testing.assert_array_equal(hits, wanted, f"layer {layer}, {num_slots} slots of {num_experts}")
    np.testing.assert_array_equal(found == -1, trace.experts == -1)


def test_ranks_of_a_long_trace():
    """Enough tokens for long pauses, ties and a full cache: 8 of 32 experts, a Zipf-like choice."""
    generator = np.random.default_rng(1)
    scores = generator.gumbel(size=(400, 1, 32)) - np.log(np.arange(1, 33))
    trace = trace_of(scores.argsort(axis=-1)[..., ::-1][..., :8], [32])
    for name in POLICIES:
        found = ranks(name, trace).experts[:, 0]
        for num_slots in (1, 7, 8, 9, 16, 31):
            wanted = replay(name, trace.experts[:, 0].tolist(), num_slots, 32, trace.replies)
            np.testing.assert_array_equal(found < num_slots, wanted, f"{name}, {num_slots} slots")


def test_ranks_of_lru_are_stack_distances():
    trace = one_layer([[0], [1], [2], [0], [0], [3], [1]], 5)
    assert ranks("lru", trace).experts[:, 0, 0].tolist() == [5, 5, 5, 2, 0, 5, 3]  # 5 of 5: never used before


def test_guesses_are_judged_at_the_same_instant():
    trace = trace_of([[[0]], [[1]], [[0]]], [4], guesses=[[[0, -1]], [[0, 1]], [[1, 0]]])
    found = ranks("lru", trace)
    assert found.experts[:, 0, 0].tolist() == [4, 4, 1]
    assert found.guesses[:, 0].tolist() == [[4, -1], [0, 4], [0, 1]]


def best_hits(experts, slots_of_tokens):
    """The most hits that any choice of victims reaches, by trying them all."""
    reached = {frozenset(): 0}  # contents of the cache -> most hits so far
    for row, num_slots in zip(experts, slots_of_tokens, strict=True):
        used = {expert for expert in row if expert >= 0}
        following = {}
        left = [
            (frozenset(kept), hits)
            for cache, hits in reached.items()
            for kept in itertools.combinations(cache, min(num_slots, len(cache)))
        ]
        for cache, hits in left:
            others = cache - used
            stay = itertools.combinations(used, min(num_slots, len(used)))
            keep = itertools.combinations(others, min(max(0, num_slots - len(used)), len(others)))
            for first, second in itertools.product(stay, keep):
                after = frozenset(first + second)
                following[after] = max(following.get(after, 0), hits + len(cache & used))
        reached = following
    return max(reached.values())


@SOME
@given(trace=traces(max_tokens=12))
def test_belady_is_the_best_of_all_choices(trace):
    for layer, num_experts in enumerate(trace.num_experts):
        experts = trace.experts[:, layer]
        for num_slots in range(num_experts + 1):
            hits = belady_hits(experts, num_slots, num_experts)
            assert hits.sum() == best_hits(experts.tolist(), [num_slots] * len(experts)), (layer, num_slots)
            assert not (hits & (experts < 0)).any()
            lru = ranks("lru", trace).experts[:, layer]
            assert hits.sum() >= ((lru >= 0) & (lru < num_slots)).sum()


@SOME
@given(trace=traces(max_tokens=9), data=st.data())
def test_belady_is_the_best_of_all_choices_when_slots_change(trace, data):
    for layer, num_experts in enumerate(trace.num_experts):
        experts = trace.experts[:, layer].tolist()
        slots = data.draw(st.lists(st.integers(0, num_experts), min_size=len(experts), max_size=len(experts)))
        hits = belady_hits(trace.experts[:, layer], slots, num_experts)
        assert hits.sum() == best_hits(experts, slots), (layer, slots)


def test_belady_of_the_textbook():
    """The reference string of many lectures: three frames hit 11 of 20 pages, 8 under LRU."""
    pages = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
    hits = belady_hits(np.array(pages, np.int16)[:, None], 3, 8)
    assert [page for page, hit in zip(pages, hits[:, 0], strict=True) if hit] == [0, 0, 2, 3, 3, 2, 2, 0, 1, 0, 1]


def test_random_victims_are_equally_likely_and_repeatable():
    """Three experts fill three slots, a fourth comes: each of the three is gone in a third of 3000 layers."""
    trace = trace_of([[[expert]] * 3000 for expert in (0, 1, 2, 3, 0)], [4] * 3000)
    found = ranks("random", trace, seed=7)
    lost = (found.experts[-1, :, 0] >= 3).mean()
    assert lost == pytest.approx(1 / 3, abs=0.03)
    np.testing.assert_array_equal(found.experts, ranks("random", trace, seed=7).experts)
    assert (found.experts != ranks("random", trace, seed=8).experts).any()


def test_unknown_policy():
    with pytest.raises(BadSettings, match="'lrru' is unknown, did you mean 'lru'"):
        ranks("lrru", one_layer([[0]], 1))


def test_hit_curve():
    curve = hit_curve(np.array([[4, 4], [0, -1], [1, 3]], np.int16), 4)
    np.testing.assert_allclose(curve, [0, 1 / 5, 2 / 5, 2 / 5, 3 / 5])


def test_hit_curve_of_a_layer_that_nobody_used():
    np.testing.assert_array_equal(hit_curve(np.array([[-1]], np.int16), 3), [0, 0, 0, 0])
