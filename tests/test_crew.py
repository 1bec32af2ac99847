"""Two threads that compute side by side: same results in order, errors handed on, no thread left."""

from __future__ import annotations

import threading

import pytest
import torch

from moepic_core.crew import Crew


@pytest.fixture
def crew() -> Crew:
    made = Crew()
    yield made
    made.close()


@pytest.mark.parametrize("count", range(7))
def test_results_come_in_the_order_of_the_items(crew: Crew, count: int) -> None:
    assert crew.map(lambda item: item * item, range(count)) == [item * item for item in range(count)]


def test_both_threads_work_and_each_on_one_core(crew: Crew) -> None:
    before = torch.get_num_threads()
    seen = crew.map(lambda _: (threading.current_thread().name, torch.get_num_threads()), range(4))
    assert [name for name, _ in seen] == ["MainThread", "moepic-crew"] * 2
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == before


def test_a_product_has_the_same_bits_on_either_thread(crew: Crew) -> None:
    weights = torch.randn(96, 64, dtype=torch.bfloat16)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    first, second = crew.map(lambda _: x @ weights.t(), range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_on_either_thread_reaches_the_caller(crew: Crew, bad: int) -> None:
    def work(item: int) -> int:
        if item == bad:
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match=f"item {bad}"):
        crew.map(work, range(2))
    assert crew.map(work, [5, 6]) == [5, 6]


def test_closing_ends_the_thread() -> None:
    crew = Crew()
    crew.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "moepic-crew"]
