"""Tensors are read from their files exactly, once, in steps that report progress and can be stopped."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepic_core import lazy_tensors
from moepic_core.errors import BadCheckpoint, Cancelled
from moepic_core.lazy_tensors import Buffers, LazyTensors, ReadAhead
from moepic_core.safetensors_header import read_header
from moepic_core.shards import read_tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(dtype): (torch.randn(3, 5) * 4).to(dtype) for dtype in dtypes}
    save_file({**tensors, "empty": torch.empty(0, 5), "scalar": torch.tensor(2.5)}, path)
    return path


def test_every_dtype_and_shape_is_read_exactly(file: Path) -> None:
    expected = load_file(file)
    tensors = LazyTensors(read_header(file))
    assert set(tensors) == set(expected)
    assert len(tensors) == len(expected)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        assert tensor.dtype == expected[name].dtype
        read = tensor[...]
        assert read.dtype == expected[name].dtype
        assert torch.equal(read, expected[name])


def test_each_read_gives_memory_of_its_own(file: Path) -> None:
    tensor = LazyTensors(read_header(file))["torch.float32"]
    first, second = tensor[...], tensor[...]
    first.zero_()
    assert torch.equal(second, load_file(file)["torch.float32"])


def test_progress_adds_up_and_comes_in_chunks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 16)
    counts: list[int] = []
    tensors = LazyTensors(read_header(file), progress=counts.append)
    assert tensors["torch.float32"][...].numel() == 15
    assert counts == [16, 16, 16, 12]
    for tensor in tensors.values():
        tensor[...]
    assert sum(counts) == 60 + tensors.num_bytes


def test_a_stop_takes_effect_at_the_next_chunk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 16)
    counts: list[int] = []
    tensors = LazyTensors(read_header(file), progress=counts.append, cancelled=lambda: len(counts) == 2)
    with pytest.raises(Cancelled):
        tensors["torch.float32"][...]
    assert counts == [16, 16]


def test_a_file_that_shrinks_is_named(file: Path) -> None:
    tensors = LazyTensors(read_header(file))
    last = max(tensors, key=lambda name: tensors[name].info.stop)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=r"model.safetensors ended 1 bytes early; it changed while loading"):
        tensors[last][...]
    file.unlink()
    with pytest.raises(BadCheckpoint, match="No such file or directory; check the disk"):
        tensors[last][...]


def test_transformers_takes_the_mapping_as_a_state_dict(checkpoints: Callable[..., Path]) -> None:
    from transformers import MixtralForCausalLM

    folder = checkpoints("mixtral")
    counts: list[int] = []
    tensors = LazyTensors(read_tensors(folder), progress=counts.append)
    wanted = MixtralForCausalLM.from_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(None, config=wanted.config, state_dict=tensors)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
    assert sum(counts) == tensors.num_bytes


def test_a_stop_reaches_the_caller_through_transformers(checkpoints: Callable[..., Path]) -> None:
    from transformers import AutoConfig, MixtralForCausalLM

    folder = checkpoints("mixtral")
    tensors = LazyTensors(read_tensors(folder), cancelled=lambda: True)
    with pytest.raises(Cancelled):
        MixtralForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=tensors)


def test_what_follows_in_the_file_is_asked_for_ahead(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, count, advice: asked.append((start, start + count)))
    ahead = ReadAhead(64)
    with file.open("rb") as open_file:
        for position in (0, 16, 32, 48, 64, 16, 200, 210):
            ahead.before(file, open_file.fileno(), position)
        ReadAhead(0).before(file, open_file.fileno(), 0)
    assert asked == [(0, 64), (64, 96), (96, 128), (16, 80), (200, 264)]  # every byte of a run once, anew after a jump


def test_a_file_system_that_takes_no_advice_is_read_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    tensors = LazyTensors(read_header(file))
    assert all(torch.equal(tensors[name][...], tensor) for name, tensor in load_file(file).items())


def test_read_files_can_be_dropped_from_the_page_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: dropped.append(rest))
    tensors = LazyTensors(read_header(file))
    tensors.forget()
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]  # one file, however many tensors
    file.unlink()
    tensors.forget()  # a file that is gone is forgotten already


def test_memory_of_tensors_that_are_gone_is_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "SPARE_BYTES", 16)
    buffers = Buffers()

    def places(*sizes: int) -> list[int]:
        """Where tensors of these sizes lie that exist side by side, for a moment."""
        return [tensor.data_ptr() for tensor in [buffers.take(size) for size in sizes]]

    up, down = places(32, 16)
    assert places(16, 32) == [down, up]
    kept = buffers.take(32)
    assert kept.data_ptr() == up
    part = kept[5:].view(torch.int8)
    del kept
    assert places(32) != [up]  # a view is using it
    del part
    assert places(32) == [up]


def test_few_buffers_stay_and_none_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "SPARE_BYTES", 16)
    buffers = Buffers()
    made: list[weakref.ref[torch.Tensor]] = []
    make = torch.empty

    def remember(*arguments: Any, **options: Any) -> torch.Tensor:
        memory = make(*arguments, **options)
        made.append(weakref.ref(memory))
        return memory

    def alive() -> list[int]:
        return [memory.numel() for memory in (ref() for ref in made) if memory is not None]

    monkeypatch.setattr(torch, "empty", remember)
    tensors = [buffers.take(size) for size in (16, 17, 18)]
    while tensors:
        tensors.pop(0)
    assert alive() == [17, 18]
    last = buffers.take(18)
    buffers.close()
    assert alive() == [18]
    del last
    assert alive() == []
