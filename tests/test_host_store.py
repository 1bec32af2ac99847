"""Both stores hand out exactly the packed bytes; a packed file is whole and ours, or it is packed again."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepic_core import ram_store
from moepic_core.disk_store import DiskStore, default_packed_folder
from moepic_core.errors import BadCheckpoint, MoepicError, OutOfRoom
from moepic_core.geometry import record_stride, segment
from moepic_core.host_store import HostStore
from moepic_core.packing import FusedLayout, aligned_bytes, check_layout, pack_expert, rows_of
from moepic_core.ram_store import RamStore
from moepic_core.spec import ModelSpec, MoeLayer
from moepic_core.transfer.base import Priority
from moepic_core.transfer.thread import ThreadTransfer

DTYPE = torch.bfloat16
LAYOUT = FusedLayout(is_transposed=True)
LAYERS = (MoeLayer(1, 3, 41, 40, 3, 2), MoeLayer(2, 2, 97, 40, 3, 2))  # records end inside an alignment unit
SPEC = ModelSpec(
    path="/models/tiny", name="tiny", model_type="tiny", architecture="Tiny", dtype="bfloat16", num_layers=3,
    moe_layers=LAYERS, top_k=2, hidden=40, vocab_size=100, context_length=512, resident_bytes=1, kv_bytes_per_token=1,
    num_parameters=1, active_parameters=1, file_bytes=1, shards=("a",), fingerprint="0123456789abcdef" * 2,
)  # fmt: skip
FILE_BYTES = 4096 + 3 * 12288 + 2 * 24576
Usage = namedtuple("Usage", "total used free")


def fused_of(layer: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(layer)
    shapes = LAYOUT.shapes(LAYERS[layer])
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def add(store: HostStore, layer: int, like: int | None = None) -> None:
    """A layer of random weights, or those of layer `like` once more."""
    for name, tensor in fused_of(layer if like is None else like).items():
        store.add(layer, name, tensor, LAYOUT)


def fill(store: HostStore) -> HostStore:
    for layer in range(len(LAYERS)):
        add(store, layer)
    store.seal()
    return store


def expected_record(layer: int, expert: int) -> Tensor:
    """The record's bytes, packed directly."""
    geometry, fused = LAYERS[layer], fused_of(layer)
    record = rows_of(aligned_bytes(geometry.expert_bytes), geometry, DTYPE, 0, geometry.neurons)
    for name, tensor in fused.items():
        pack_expert(record, name, tensor[expert], LAYOUT)
    return record.reshape(-1).view(torch.uint8)


def assert_complete(store: HostStore) -> None:
    """Every segment of several splits arrives over a real transfer as it was packed."""
    assert store.complete
    transfer = ThreadTransfer()
    for layer, geometry in enumerate(LAYERS):
        for expert in range(geometry.num_experts):
            for rows in (1, 15, geometry.neurons - 1, geometry.neurons):
                buffer = aligned_bytes(record_stride(geometry)).fill_(99)
                bounds = {(0, rows), (rows, geometry.neurons)} - {(geometry.neurons, geometry.neurons)}
                for start_row, stop_row in sorted(bounds):
                    part = segment(geometry, start_row, stop_row)
                    source = store.source(layer, expert, part)
                    transfer.submit(source, buffer[part.start : part.stop], Priority.DEMAND).wait()
                assert torch.equal(buffer[: geometry.expert_bytes], expected_record(layer, expert)), (
                    layer,
                    expert,
                    rows,
                )
    transfer.close()


def packers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("moepic-pack")}


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture(autouse=True)
def no_descriptor_stays_open() -> Iterator[None]:
    def files() -> list[str]:
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if link.is_symlink() and "moepic" in os.readlink(link)]

    yield
    assert not [file for file in files() if file.endswith((".moepic", ".partial", "(deleted)"))]


@pytest.mark.parametrize("pinned", [False, True])
def test_memory_holds_every_segment(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = RamStore(SPEC, DTYPE, pinned)
    assert not store.complete
    fill(store)
    assert_complete(store)
    if pinned:
        assert store.notice is not None
        assert store.notice.startswith("only 0 B of expert memory could be page-locked (there is no CUDA device)")
    else:
        assert store.notice is None
    store.close()


def test_a_tensor_is_packed_beside_the_reading_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """`add` comes back at once; the next `add` waits, and `seal` leaves no thread."""
    before, go, packed = packers(), threading.Event(), list[str]()

    def wait(record: Tensor, name: str, *rest: Any) -> None:
        assert go.wait(60)
        packed.append(name)
        pack_expert(record, name, *rest)

    monkeypatch.setattr(ram_store, "pack_expert", wait)
    store = RamStore(SPEC, DTYPE, pinned=False)
    store.add(0, "gate_up_proj", fused_of(0)["gate_up_proj"], LAYOUT)
    assert not packed
    go.set()
    store.add(0, "down_proj", fused_of(0)["down_proj"], LAYOUT)
    assert packed[:3] == ["gate_up_proj"] * 3  # all three experts
    add(store, 1)
    store.seal()
    assert_complete(store)
    assert packers() <= before
    store.close()


def test_a_packed_tensor_is_let_go_of() -> None:
    """Its memory is the next one's: at most one is being packed while one is read."""
    store, added = RamStore(SPEC, DTYPE, pinned=False), list[weakref.ref[Tensor]]()
    for layer in range(len(LAYERS)):
        fused = fused_of(layer)
        for name in list(fused):
            added.append(weakref.ref(fused[name]))
            store.add(layer, name, fused.pop(name), LAYOUT)
            assert [ref() is None for ref in added] == [True] * (len(added) - 1) + [False]
    store.seal()
    assert [ref() for ref in added] == [None] * 4
    store.close()


def test_what_packing_raises_comes_out_of_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ram_store, "pack_expert", fail)
    before, store = packers(), RamStore(SPEC, DTYPE, pinned=False)
    tensor = fused_of(0)["down_proj"]
    store.add(0, "down_proj", tensor, LAYOUT)
    for call in (lambda: store.add(0, "down_proj", tensor, LAYOUT), store.seal):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            call()
    store.close()
    assert packers() <= before


def test_a_layer_that_lacks_a_tensor_is_not_complete() -> None:
    store = RamStore(SPEC, DTYPE, pinned=False)
    add(store, 0)
    store.add(1, "down_proj", fused_of(1)["down_proj"], LAYOUT)
    with pytest.raises(AssertionError, match=r"layers \[1\] were never packed"):
        store.seal()
    store.close()


def test_pinning_ends_at_the_first_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer counts for itself: what was pinned stays pinned and is released with the store."""
    pins: list[FakePin] = []

    class FakePin:
        def __init__(self, tensor: Tensor) -> None:
            self.nbytes, self.error, self.released = tensor.numel(), None if not pins else "out of memory", False
            pins.append(self)

        def release(self) -> None:
            self.released = True

    monkeypatch.setattr("moepic_core.ram_store.pin", FakePin)
    three = replace(SPEC, moe_layers=(LAYERS[0],) * 3)
    store = RamStore(three, DTYPE, pinned=True)
    for layer in range(3):
        add(store, layer, like=0)
    store.seal()
    assert len(pins) == 2
    assert store.notice is not None
    assert store.notice.startswith("only 36.9 kB of expert memory could be page-locked (out of memory)")
    store.close()
    assert [pin.released for pin in pins] == [True, False]


def test_the_disk_holds_every_segment_and_serves_the_next_start(tmp_path: Path) -> None:
    store = DiskStore(SPEC, DTYPE, tmp_path / "new" / "folder")
    assert not store.complete
    assert names(store.path.parent) == [".partial"]
    fill(store)
    assert_complete(store)
    assert names(store.path.parent) == [".moepic"]
    assert store.path.name == "tiny-0123456789abcdef-bfloat16.moepic"
    assert store.path.stat().st_size == store.file_bytes == FILE_BYTES
    store.close()
    packed = store.path.read_bytes()

    again = DiskStore(SPEC, DTYPE, store.path.parent)
    assert again.complete  # nothing to pack
    assert again.notice is None or "no direct I/O" in again.notice
    again.seal()
    assert_complete(again)
    again.close()
    again.close()
    assert again.path.read_bytes() == packed


def test_padding_between_records_is_zero(tmp_path: Path) -> None:
    """Equal checkpoints make equal files."""
    fill(store := DiskStore(SPEC, DTYPE, tmp_path)).close()
    data = store.path.read_bytes()
    end = 4096 + LAYERS[0].expert_bytes
    assert LAYERS[0].expert_bytes % 4096
    assert not any(data[end : 4096 + record_stride(LAYERS[0])])


def truncate(path: Path) -> None:
    os.truncate(path, FILE_BYTES - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    os.truncate(path, FILE_BYTES + 4096)


def change_length(path: Path) -> None:
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


def change_fingerprint(path: Path) -> None:
    """The name has 16 of its characters, the header all."""
    path.write_bytes(path.read_bytes().replace(SPEC.fingerprint.encode(), SPEC.fingerprint[::-1].encode()))


def change_geometry(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[3, 41, 3, 40]", b"[3, 40, 3, 41]"))


@pytest.mark.parametrize("damage", [truncate, empty, grow, change_length, change_fingerprint, change_geometry])
def test_a_damaged_or_foreign_file_is_packed_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    fill(store := DiskStore(SPEC, DTYPE, tmp_path)).close()
    good = store.path.read_bytes()
    damage(store.path)
    assert store.path.read_bytes() != good
    again = DiskStore(SPEC, DTYPE, tmp_path)
    assert not again.complete
    assert again.notice is not None
    assert again.notice == f"the packed file {store.path} was damaged or of another checkpoint, so it is packed again"
    assert_complete(fill(again))
    again.close()
    assert store.path.read_bytes() == good


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (replace(SPEC, fingerprint="f" * 32), DTYPE),
        (replace(SPEC, path="/models/other"), DTYPE),
        (replace(SPEC, moe_layers=tuple(replace(layer, itemsize=4) for layer in LAYERS)), torch.float32),
    ],
    ids=["fingerprint", "name", "dtype"],
)
def test_another_checkpoint_or_dtype_has_its_own_file(spec: ModelSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    fill(first := DiskStore(SPEC, DTYPE, tmp_path)).close()
    second = DiskStore(spec, dtype, tmp_path)
    assert not second.complete
    assert second.path != first.path
    second.close()
    assert names(tmp_path) == [".moepic"]  # a start that is given up leaves nothing


def test_a_killed_start_leaves_only_a_partial_that_the_next_one_overwrites(tmp_path: Path) -> None:
    killed = DiskStore(SPEC, DTYPE, tmp_path)
    add(killed, 1)
    assert killed._writer is not None
    os.close(killed._writer)  # as the kernel does
    assert names(tmp_path) == [".partial"]
    os.truncate(tmp_path / f"{killed.path.stem}.partial", 3 * FILE_BYTES)
    store = DiskStore(SPEC, DTYPE, tmp_path)
    assert not store.complete
    assert_complete(fill(store))
    store.close()
    assert names(tmp_path) == [".moepic"]
    assert store.path.stat().st_size == FILE_BYTES


def test_two_starts_at_once_do_not_write_into_each_other(tmp_path: Path) -> None:
    first = DiskStore(SPEC, DTYPE, tmp_path)
    add(first, 0)
    with pytest.raises(MoepicError, match=r"\.partial is being written by another MoEpic; wait until that is done"):
        DiskStore(SPEC, DTYPE, tmp_path)
    add(first, 1)
    first.seal()
    assert_complete(first)
    first.close()


def test_a_disk_that_is_too_small_is_refused_before_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**6, 10**6, FILE_BYTES - 1))
    with pytest.raises(OutOfRoom) as refused:
        DiskStore(SPEC, DTYPE, tmp_path)
    assert str(refused.value) == (
        f"cannot pack 90.1 kB of experts into {tmp_path}: No space left on device; "
        f"free some space or choose another folder with packed_dir"
    )
    assert names(tmp_path) == []


def test_room_that_a_killed_start_took_counts_as_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    partial = tmp_path / "tiny-0123456789abcdef-bfloat16.partial"
    partial.write_bytes(b"x" * FILE_BYTES)

    def usage(path: Path) -> Usage:
        return Usage(10**6, 0, FILE_BYTES - partial.stat().st_size)

    monkeypatch.setattr("shutil.disk_usage", usage)
    fill(DiskStore(SPEC, DTYPE, tmp_path)).close()


@pytest.mark.parametrize("writes_that_work", [0, 1, 4])
def test_a_disk_that_fills_up_while_packing(
    writes_that_work: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, count = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > writes_that_work:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutOfRoom, match=r"^cannot pack 90\.1 kB of experts into .*: No space left on device; [^\n]*$"):
        fill(DiskStore(SPEC, DTYPE, tmp_path))
    assert count == writes_that_work + 1
    assert names(tmp_path) == []


def test_a_disk_that_writes_little_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    store = fill(DiskStore(SPEC, DTYPE, tmp_path))
    assert_complete(store)
    store.close()


def test_a_disk_that_fails_at_the_last_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutOfRoom, match="Input/output error"):
        fill(DiskStore(SPEC, DTYPE, tmp_path))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OutOfRoom, match=r"cannot pack .* into .*/file.*; free some space or choose another folder"):
            DiskStore(SPEC, DTYPE, folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_WRONLY:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutOfRoom, match=os.strerror(number)):
        DiskStore(SPEC, DTYPE, tmp_path)


def test_a_file_system_without_direct_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    store = fill(DiskStore(SPEC, DTYPE, tmp_path))
    assert store.notice == f"{tmp_path} has no direct I/O, so reads go through the page cache"
    source = store.source(0, 0, segment(LAYERS[0], 0, 1))
    assert source.direct is False
    assert not fcntl.fcntl(source.fd, fcntl.F_GETFL) & os.O_DIRECT
    assert_complete(store)
    store.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_forgotten_layer_is_a_mistake_of_ours(kind: str, tmp_path: Path) -> None:
    store: HostStore = RamStore(SPEC, DTYPE, False) if kind == "memory" else DiskStore(SPEC, DTYPE, tmp_path)
    add(store, 1)
    with pytest.raises(AssertionError, match=r"layers \[0\] were never packed"):
        store.seal()
    store.close()


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    fused = fused_of(0)
    check_layout(LAYERS[0], fused, LAYOUT, "model.layers.1.mlp.experts")
    with pytest.raises(BadCheckpoint, match=r"experts\.gate_up_proj should be \[2, 40, 194\] but is \(3, 40, 82\)"):
        check_layout(LAYERS[1], fused, LAYOUT, "model.layers.2.mlp.experts")
    del fused["down_proj"]
    with pytest.raises(BadCheckpoint, match=r"experts\.down_proj should be \[3, 41, 40\] but is None"):
        check_layout(LAYERS[0], fused, LAYOUT, "model.layers.1.mlp.experts")


def test_where_packed_files_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MOEPIC_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_packed_folder() == Path("/home/someone/.cache/moepic/packed")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_packed_folder() == Path("/cache/moepic/packed")
    monkeypatch.setenv("MOEPIC_HOME", "~/elsewhere")
    assert default_packed_folder() == Path("/home/someone/elsewhere/packed")
