"""eviction.py: exact victims for hand-made histories, and every policy against a slow reference."""

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.errors import BadSettings
from moepic_core.eviction import LCP_OMEGA, LCP_RHO, make_policy

NUM_EXPERTS = 6
POLICIES = ("lcp", "lru", "lfu")

# (expert, token, count) in order; candidates; token of the eviction; who leaves under each policy
TABLE = [
    pytest.param([(0, 0, 1), (1, 1, 1), (2, 2, 1)], {0, 1, 2}, 3, {"lcp": 0, "lru": 0, "lfu": 0}, id="oldest"),
    pytest.param([(0, 0, 9), (1, 1, 1), (2, 2, 1)], {0, 1, 2}, 3, {"lcp": 1, "lru": 0, "lfu": 1}, id="often-stays"),
    pytest.param([(0, 0, 9), (1, 1, 1)], {0, 1, 5}, 3, {"lcp": 5, "lru": 5, "lfu": 5}, id="never-used-leaves-first"),
    pytest.param([(3, 4, 2), (2, 4, 2)], {3, 2}, 4, {"lcp": 2, "lru": 2, "lfu": 2}, id="equals-lowest-id"),
    pytest.param([], {4, 2, 5}, 0, {"lcp": 2, "lru": 2, "lfu": 2}, id="all-unused-lowest-id"),
    pytest.param([(0, 0, 9), (1, 1, 1)], {1}, 3, {"lcp": 1, "lru": 1, "lfu": 1}, id="one-candidate"),
    # 4 activations are worth one ω of idling: at 127 idle tokens expert 1 stays, at 128 they tie, at 129 it leaves
    pytest.param([(1, 0, 4), (0, 127, 1)], {0, 1}, 200, {"lcp": 0, "lru": 1, "lfu": 0}, id="before-omega"),
    pytest.param([(1, 0, 4), (0, 128, 1)], {0, 1}, 200, {"lcp": 0, "lru": 1, "lfu": 0}, id="at-omega-exact-tie"),
    pytest.param([(1, 0, 4), (0, 129, 1)], {0, 1}, 200, {"lcp": 1, "lru": 1, "lfu": 0}, id="after-omega"),
    # 0.25 ** (10**6 / 128) is zero in floating point, yet the order of the idle is kept
    pytest.param([(2, 0, 1), (1, 1, 1)], {1, 2}, 10**9, {"lcp": 2, "lru": 2, "lfu": 1}, id="no-underflow"),
]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("history", "candidates", "now", "leaves"), TABLE)
def test_victim(name, history, candidates, now, leaves):
    policy = make_policy(name, NUM_EXPERTS)
    for expert, token, count in history:
        policy.touch(expert, token, count)
        policy.check()
    assert policy.victim(candidates, now) == leaves[name]
    assert policy.victim(sorted(candidates, reverse=True), now) == leaves[name]  # the order of asking does not matter


def paper_priority(count, idle):
    return count * LCP_RHO ** (idle / LCP_OMEGA)


def test_lcp_priority_is_the_logarithm_of_the_papers():
    policy = make_policy("lcp", NUM_EXPERTS)
    policy.touch(0, 10, 3)
    policy.touch(0, 40, 2)
    assert policy.priority(0, 100) == pytest.approx(math.log2(paper_priority(5, 60)), rel=1e-12)
    assert policy.priority(1, 100) == -math.inf


def test_priorities_of_lru_and_lfu():
    lru, lfu = make_policy("lru", NUM_EXPERTS), make_policy("lfu", NUM_EXPERTS)
    for policy in (lru, lfu):
        policy.touch(2, 7, 5)
        policy.touch(2, 9)
    assert (lru.priority(2, 20), lfu.priority(2, 20)) == (9, 6)


@pytest.mark.parametrize(("name", "ranking"), [("lcp", [1, 0, 3]), ("lru", [3, 1, 0]), ("lfu", [0, 1, 3])])
def test_ranking_lists_touched_experts_best_first(name, ranking):
    policy = make_policy(name, NUM_EXPERTS)
    for expert, token, count in [(0, 0, 5), (1, 90, 4), (3, 91, 1)]:
        policy.touch(expert, token, count)
    assert policy.ranking(100) == ranking


touches = st.lists(st.tuples(st.integers(0, NUM_EXPERTS - 1), st.integers(0, 300), st.integers(1, 40)), max_size=30)


@pytest.mark.parametrize("name", POLICIES)
@given(history=touches, idle=st.integers(0, 300), candidates=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1))
def test_against_a_slow_reference(name, history, idle, candidates):
    """The victim is a minimum, by the textbook definition, and the ranking is the order of repeated eviction."""
    policy, count, last, now = make_policy(name, NUM_EXPERTS), defaultdict(int), {}, 0
    for expert, gap, times in history:
        now += gap
        policy.touch(expert, now, times)
        policy.check()
        count[expert] += times
        last[expert] = now
    now += idle

    def worth(expert):
        if expert not in last:
            return -1.0
        return {"lcp": math.log(count[expert]) + (now - last[expert]) / LCP_OMEGA * math.log(LCP_RHO) + 1e6,
                "lru": last[expert], "lfu": count[expert]}[name]  # fmt: skip

    victim = policy.victim(candidates, now)
    assert worth(victim) == pytest.approx(min(map(worth, candidates)), rel=1e-12)
    assert policy.victim(candidates, now + 10**6) == victim  # idling together changes no order

    order, left = [], set(last)
    while left:
        leaves = policy.victim(left, now)
        left.remove(leaves)
        order.append(leaves)
    priorities = [policy.priority(expert, now) for expert in policy.ranking(now)]
    assert priorities == sorted(priorities, reverse=True)
    assert priorities == [policy.priority(expert, now) for expert in reversed(order)]


def test_a_token_number_cannot_go_back():
    policy = make_policy("lru", NUM_EXPERTS)
    policy.touch(0, 5)
    with pytest.raises(AssertionError, match="token 4 after token 5"):
        policy.touch(0, 4)


def test_check_names_both_sides():
    policy = make_policy("lfu", NUM_EXPERTS)
    policy.touch(1, 3, 2)
    policy._keys[1] = 7
    with pytest.raises(AssertionError, match="expert 1: key 7, its history says 2"):
        policy.check()


def test_unknown_policy_offers_the_nearest_name():
    with pytest.raises(BadSettings, match="'lpc' is unknown, did you mean 'lcp'"):
        make_policy("lpc", NUM_EXPERTS)
