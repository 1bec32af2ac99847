"""trace.py: the ring keeps the newest rows, and covered time is the length of a union."""

from hypothesis import given
from hypothesis import strategies as st

from moepic_core.trace import EVENT, Coverage, Ring


@given(capacity=st.integers(1, 9), written=st.integers(0, 30), data=st.data())
def test_ring_keeps_the_newest_and_counts_the_lost(capacity, written, data):
    ring = Ring(EVENT, capacity)
    for token in range(written):
        ring.put((0, 0, 0, 0, 0, 0, token, 0, 0.0, 0.0))
    since = data.draw(st.integers(0, written))
    rows, lost = ring.since(since)
    wanted = list(range(written))[-capacity:]
    assert rows["token"].tolist() == [token for token in wanted if token >= since]
    assert since + lost + len(rows) == written


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), max_size=40))
def test_coverage_is_the_length_of_the_union(spans):
    coverage, covered = Coverage(), set()
    for start, length in spans:
        cells = set(range(start, start + length))
        assert coverage.add(start, start + length) == len(cells - covered)
        covered |= cells
        coverage.check()


def test_coverage_forgets_only_the_far_past():
    coverage = Coverage()
    for second in range(65):  # one more than is remembered: the gap up to 0.5 s counts as covered from now on
        assert coverage.add(second, second + 0.5) == 0.5
    assert coverage.add(-3.0, 1.0) == 0.5
    assert coverage.add(-3.0, 64.0) == 31.5
    coverage.check()
