"""eviction.py: exact victims for hand-made histories, and every policy against a slow reference."""

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.errors import BadSettings
from moepic_core.eviction import LCP_OMEGA, LCP_RHO, make_policy

NUM_EXPERTS = 6
POLICIES = ("lcp", "lcp-aged", "lru", "lfu", "request-frequency")
ALIKE = {"lcp-aged": "lcp", "request-frequency": "lfu"}  # while no expert is touched twice, and within one request

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
    wanted = leaves[ALIKE.get(name, name)]
    assert policy.victim(candidates, now) == wanted
    assert policy.victim(sorted(candidates, reverse=True), now) == wanted  # the order of asking does not matter


def paper_priority(count, idle):
    return count * LCP_RHO ** (idle / LCP_OMEGA)


def test_lcp_priority_is_the_logarithm_of_the_papers():
    policy = make_policy("lcp", NUM_EXPERTS)
    policy.touch(0, 10, 3)
    policy.touch(0, 40, 2)
    assert policy.priority(0, 100) == pytest.approx(math.log2(paper_priority(5, 60)), rel=1e-12)
    assert policy.priority(1, 100) == -math.inf


def test_every_activation_fades_in_lcp_aged():
    policy = make_policy("lcp-aged", NUM_EXPERTS)
    policy.touch(0, 10, 3)
    policy.touch(0, 40, 2)
    wanted = paper_priority(3, 90) + paper_priority(2, 60)
    assert policy.priority(0, 100) == pytest.approx(math.log2(wanted), rel=1e-12)
    assert policy.priority(1, 100) == -math.inf


def test_one_stray_activation_brings_old_fame_back_only_under_lcp():
    """Expert 0 served the old subject 1000 times, expert 1 serves the new one; then 0 is touched once by accident."""
    for name, leaves in [("lcp", 1), ("lcp-aged", 0)]:
        policy = make_policy(name, NUM_EXPERTS)
        for token in range(1000):
            policy.touch(0, token)
        for token in range(1500, 1600, 10):
            policy.touch(1, token)
        policy.touch(0, 1595)
        assert policy.victim([0, 1], 1600) == leaves, name


def test_mu_stays_small_in_lcp_aged():
    """However long an expert was used at every token, its μ is that of the geometric series."""
    policy = make_policy("lcp-aged", NUM_EXPERTS)
    for token in range(20_000):
        policy.touch(0, token)
    limit = 1 / (1 - LCP_RHO ** (1 / LCP_OMEGA))
    assert policy.priority(0, token) == pytest.approx(math.log2(limit), rel=1e-12)


def test_request_frequency_forgets_what_went_before():
    """The share of this request's activations counts; whoever has none leaves first, the lowest id among those."""
    policy = make_policy("request-frequency", NUM_EXPERTS)
    for expert, token in [(2, 0), (2, 1), (2, 2), (0, 3)]:
        policy.touch(expert, token)
    policy.begin_request()
    policy.check()
    assert (policy.ranking(4), policy.priority(2, 4)) == ([], -math.inf)
    policy.touch(1, 4)
    policy.check()
    assert policy.victim([1, 2], 5) == 2
    assert policy.victim([2, 0, 1], 5) == 0


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "request-frequency"])
def test_the_others_take_no_notice_of_requests(name):
    told, untold = make_policy(name, NUM_EXPERTS), make_policy(name, NUM_EXPERTS)
    for expert, token in [(2, 0), (2, 1), (1, 2), (3, 9)]:
        told.begin_request()
        for policy in (told, untold):
            policy.touch(expert, token)
    told.begin_request()
    told.check()
    for expert in range(NUM_EXPERTS):
        assert told.priority(expert, 9) == untold.priority(expert, 9)


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


touches = st.lists(
    st.tuples(st.integers(0, NUM_EXPERTS - 1), st.integers(0, 300), st.integers(1, 40), st.booleans()), max_size=30
)


@pytest.mark.parametrize("name", POLICIES)
@given(history=touches, idle=st.integers(0, 300), candidates=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1))
def test_against_a_slow_reference(name, history, idle, candidates):
    """The victim is a minimum, by the textbook definition, and the ranking is the order of repeated eviction."""
    policy, activations, now = make_policy(name, NUM_EXPERTS), defaultdict(list), 0  # expert -> [(token, times), …]
    for expert, gap, times, new_request in history:
        now += gap
        if new_request:
            policy.begin_request()
            if name == "request-frequency":
                activations.clear()
        policy.touch(expert, now, times)
        policy.check()
        activations[expert].append((now, times))
    now += idle
    count = {expert: sum(times for _, times in touched) for expert, touched in activations.items()}
    last = {expert: touched[-1][0] for expert, touched in activations.items()}

    def worth(expert):
        if expert not in last:
            return -1.0
        faded = math.fsum(paper_priority(times, now - token) for token, times in activations[expert])
        return {"lcp": math.log(count[expert]) + (now - last[expert]) / LCP_OMEGA * math.log(LCP_RHO) + 1e6,
                "lcp-aged": math.log(faded) + 1e6,
                "lru": last[expert], "lfu": count[expert], "request-frequency": count[expert]}[name]  # fmt: skip

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
