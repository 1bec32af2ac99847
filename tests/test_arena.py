"""Device bytes are counted by kind under one hard budget, whatever is allocated, reserved and freed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.arena import KINDS, Arena, is_out_of_memory
from moepic_core.errors import OutOfRoom
from moepic_core.units import ALIGNMENT_BYTES

CPU = torch.device("cpu")


def test_buffers_are_aligned_and_counted_as_they_are() -> None:
    arena = Arena(CPU, 100_000)
    buffer = arena.allocate("cache", 5000)
    assert buffer.dtype == torch.uint8
    assert buffer.numel() == arena.bytes_by_kind["cache"] == arena.used_bytes == 8192
    assert buffer.data_ptr() % ALIGNMENT_BYTES == 0
    arena.free("cache", buffer)
    assert (arena.used_bytes, arena.peak_bytes) == (0, 8192)
    arena.check()


def test_the_budget_is_exact() -> None:
    arena = Arena(CPU, 10_000)
    arena.reserve("resident", 6_000)
    with pytest.raises(OutOfRoom, match=r"budget of 10 kB has 4 kB left, 4 kB more is needed for kv; raise the budget"):
        arena.reserve("kv", 4_001)
    arena.reserve("kv", 4_000)
    assert arena.bytes_by_kind == {"resident": 6_000, "kv": 4_000, "workspace": 0, "staging": 0, "cache": 0}
    with pytest.raises(OutOfRoom, match=r"0 B left, 4.1 kB more is needed for staging"):
        arena.allocate("staging", 1)
    arena.check()


def test_a_refusal_of_the_machine_leaves_the_books_as_they_were() -> None:
    arena = Arena(CPU, 2**60)
    with pytest.raises(OutOfRoom, match=r"the machine refused 1126 TB for cache .* lower the budget"):
        arena.allocate("cache", 2**50)
    assert arena.used_bytes == 0


def test_other_errors_are_not_taken_for_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("moepic_core.arena._allocate", broken)
    arena = Arena(CPU, 10_000)
    with pytest.raises(RuntimeError, match="device-side assert"):
        arena.allocate("cache", 1)
    assert arena.used_bytes == 0
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(ValueError("CUDA"))


@pytest.mark.parametrize(("device", "expected"), [("cuda", 1), ("cpu", 0)])
def test_what_was_freed_on_a_cuda_device_goes_back_once(
    device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(arena.used_bytes))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("moepic_core.arena._allocate", lambda nbytes, device: torch.empty(nbytes, dtype=torch.uint8))
    arena = Arena(torch.device(device), 10_000)
    buffer = arena.allocate("cache", 4096)
    arena.trim()
    assert given_back == []
    arena.free("cache", buffer)
    arena.trim()
    arena.trim()
    assert given_back == [0] * expected


def test_giving_back_more_than_was_taken_is_a_mistake_of_ours() -> None:
    arena = Arena(CPU, 10_000)
    arena.reserve("kv", 10)
    with pytest.raises(AssertionError, match=r"'kv', 11, 10"):
        arena.release("kv", 11)


def test_check_names_both_sides() -> None:
    arena = Arena(CPU, 10_000)
    arena.reserve("kv", 10)
    arena.budget_bytes = 9
    with pytest.raises(AssertionError, match=r"'kv': 10.*9"):
        arena.check()


steps = st.lists(
    st.tuples(st.sampled_from(("reserve", "allocate", "back")), st.sampled_from(KINDS), st.integers(1, 9000))
)


@given(steps, st.integers(0, 40_000))
def test_against_a_list_of_what_is_held(history: list[tuple[str, str, int]], budget: int) -> None:
    arena, held, peak = Arena(CPU, budget), [], 0
    for action, kind, nbytes in history:
        used = sum(size for _, size, _ in held)
        if action == "back" and held:
            kind, size, buffer = held.pop(nbytes % len(held))
            arena.release(kind, size) if buffer is None else arena.free(kind, buffer)
        elif action != "back":
            size = nbytes if action == "reserve" else -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if used + size > budget:
                with pytest.raises(OutOfRoom):
                    arena.reserve(kind, nbytes) if action == "reserve" else arena.allocate(kind, nbytes)
            else:
                buffer = arena.reserve(kind, nbytes) if action == "reserve" else arena.allocate(kind, nbytes)
                held.append((kind, size, buffer))
        peak = max(peak, sum(size for _, size, _ in held))
        arena.check()
        assert arena.bytes_by_kind == {
            kind: sum(size for held_kind, size, _ in held if held_kind == kind) for kind in KINDS
        }
        assert arena.peak_bytes == peak
