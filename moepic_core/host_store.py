"""The host tier: a complete, immutable copy of all expert records, in RAM or in a packed file.

Filled once while the model loads, one fused tensor at a time, then only read. Because it never changes and misses
nothing, evicting from the device is forgetting. `source()` describes a segment for a transfer; nothing here copies
toward the device.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import BadCheckpoint, MoepicError, OutOfRoom
from .folders import user_folder
from .geometry import Segment, record_stride
from .packing import FusedLayout, aligned_bytes, pack_expert, rows_of
from .spec import ModelSpec, MoeLayer
from .transfer.base import FileSource, MemorySource, Source
from .transfer.pinning import Pinned, pin
from .units import align, format_bytes

_MAGIC = "moepic-packed-1"
_NUM_FUSED = 2  # tensors per layer: into the neurons, and down
_NUM_PACKERS = 2  # one thread touches fresh memory more slowly than a disk brings it (docs/LOG.md)


class HostStore(Protocol):
    complete: bool  # True: `add` is not needed (a packed file from an earlier start)
    notice: str | None  # something that the user should know, such as memory that could not be pinned

    def add(self, layer: int, name: str, fused: Tensor, layout: FusedLayout) -> None:
        """Takes the fused tensor `name` of a layer (shape: `FusedLayout.shapes`), which nobody may change any more."""

    def seal(self) -> None:
        """Called once after the last tensor: from here on the store is complete and immutable."""

    def source(self, layer: int, expert: int, segment: Segment) -> Source: ...

    def close(self) -> None: ...


class _Job(NamedTuple):
    """A fused tensor that is being packed into its layer's records `[experts * stride]`."""

    layer: int
    name: str
    fused: Tensor
    layout: FusedLayout
    records: Tensor


class RamStore:
    """Records in host memory; page-locked when `pinned`, so that a GPU reads them at full speed.

    When pinning fails the memory stays pageable and `notice` says so. A tensor is packed by threads while the caller
    reads the next one: one at a time, so that no more than these two are in memory. What packing raises comes out of
    the next `add`, or of `seal`.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, pinned: bool) -> None:
        self.layers = spec.moe_layers
        self.dtype = dtype
        self.complete = False
        self.notice: str | None = None
        self._want_pinned = pinned
        self._pins: list[Pinned] = []
        self._records: list[Tensor | None] = [None] * len(self.layers)
        self._packed: list[set[str]] = [set() for _ in self.layers]  # names of a layer's tensors
        self._packers = ThreadPoolExecutor(_NUM_PACKERS, thread_name_prefix="moepic-pack")
        self._job: _Job | None = None
        self._packing: list[Future[None]] = []

    def add(self, layer: int, name: str, fused: Tensor, layout: FusedLayout) -> None:
        self._finish()
        geometry, records = self.layers[layer], self._records[layer]
        if records is None:
            self._records[layer] = records = aligned_bytes(geometry.num_experts * record_stride(geometry))
        self._job = _Job(layer, name, fused, layout, records)
        self._packing = [self._packers.submit(self._pack, first) for first in range(_NUM_PACKERS)]

    def seal(self) -> None:
        self._finish()
        self._packers.shutdown()
        missing = [layer for layer, names in enumerate(self._packed) if len(names) < _NUM_FUSED]
        assert not missing, f"layers {missing} were never packed"
        self.complete = True

    def source(self, layer: int, expert: int, segment: Segment) -> Source:
        records = self._records[layer]
        assert records is not None, layer
        base = expert * record_stride(self.layers[layer])
        return MemorySource(records[base + segment.start : base + segment.stop])

    def close(self) -> None:
        self._packers.shutdown()
        for pinned in self._pins:
            pinned.release()
        self._pins.clear()
        self._records = [None] * len(self.layers)

    def _finish(self) -> None:
        """Waits for what is being packed, and lets go of it."""
        for packing in self._packing:
            packing.result()
        job, self._job, self._packing = self._job, None, []
        if job is None:
            return
        self._packed[job.layer].add(job.name)
        if self._want_pinned and len(self._packed[job.layer]) == _NUM_FUSED:
            self._pin(job.records)

    def _pack(self, first: int) -> None:
        """Every second expert from `first` on. The job is no argument, since an executor lets go of those late."""
        job = self._job
        assert job is not None
        geometry = self.layers[job.layer]
        stride = record_stride(geometry)
        for expert in range(first, geometry.num_experts, _NUM_PACKERS):
            record = rows_of(job.records[expert * stride :], geometry, self.dtype, 0, geometry.neurons)
            pack_expert(record, job.name, job.fused[expert], job.layout)

    def _pin(self, records: Tensor) -> None:
        pinned = pin(records)
        if pinned.error is None:
            self._pins.append(pinned)
            return
        self._want_pinned = False
        held = sum(pin.nbytes for pin in self._pins)
        self.notice = (
            f"only {format_bytes(held)} of expert memory could be page-locked ({pinned.error}); the rest is pageable "
            f"and travels slower; raise the locked-memory limit (ulimit -l) or free host memory"
        )


class DiskStore:
    """Records in one packed file, read with direct I/O where the file system allows it.

    The file is written beside its final name and renamed when complete, so a killed start leaves nothing that looks
    usable. A complete file of the same checkpoint, dtype and geometry is used again. Raises OutOfRoom when the folder
    cannot hold the file; nothing of it is left behind then.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, folder: Path) -> None:
        self.layers = spec.moe_layers
        self.dtype = dtype
        self.notice: str | None = None
        kind = str(dtype).removeprefix("torch.")
        self.path = folder / f"{Path(spec.path).name}-{spec.fingerprint[:16]}-{kind}.moepic"
        self._partial = self.path.with_suffix(".partial")
        self._header = _header(spec, dtype)
        sizes = [geometry.num_experts * record_stride(geometry) for geometry in self.layers]
        start = align(len(self._header))
        self._starts = [start + sum(sizes[:position]) for position in range(len(sizes))]
        self.file_bytes = start + sum(sizes)
        self._missing = set(range(len(self.layers)))
        self._waiting: dict[int, dict[str, Tensor]] = {}  # layer to tensors that came before the other one
        self._fd: int | None = None
        self._direct = False
        self._writer: int | None = None
        with self._refusals():
            self.complete = self._reuse()
            if not self.complete:
                self._create()

    def add(self, layer: int, name: str, fused: Tensor, layout: FusedLayout) -> None:
        parts = self._waiting.setdefault(layer, {})
        parts[name] = fused
        if len(parts) < _NUM_FUSED:
            return
        geometry = self.layers[layer]
        buffer = aligned_bytes(record_stride(geometry))
        buffer[geometry.expert_bytes :].zero_()
        record = rows_of(buffer, geometry, self.dtype, 0, geometry.neurons)
        with self._refusals():
            for expert in range(geometry.num_experts):
                for part, tensor in parts.items():
                    pack_expert(record, part, tensor[expert], layout)
                self._write(buffer.numpy().data, self._starts[layer] + expert * buffer.numel())
        del self._waiting[layer]
        self._missing.remove(layer)

    def seal(self) -> None:
        if self.complete:
            return
        assert self._writer is not None
        assert not self._missing, f"layers {sorted(self._missing)} were never packed"
        with self._refusals():
            os.fsync(self._writer)
            os.posix_fadvise(self._writer, 0, 0, os.POSIX_FADV_DONTNEED)  # reads bypass the page cache from here on
            os.replace(self._partial, self.path)
            os.close(self._writer)
            self._writer = None
            self._open()
        self.complete = True

    def source(self, layer: int, expert: int, segment: Segment) -> Source:
        assert self._fd is not None
        offset = self._starts[layer] + expert * record_stride(self.layers[layer]) + segment.start
        return FileSource(self._fd, offset, segment.nbytes, str(self.path), self._direct)

    def close(self) -> None:
        if self._writer is not None:
            self._partial.unlink(missing_ok=True)
        for fd in (self._fd, self._writer):
            if fd is not None:
                os.close(fd)
        self._fd = self._writer = None

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What the file system refuses becomes one sentence, and the unfinished file is removed."""
        try:
            yield
        except OSError as error:
            self.close()
            raise OutOfRoom(
                f"cannot pack {format_bytes(self.file_bytes)} of experts into {self.path.parent}: {error.strerror}; "
                f"free some space or choose another folder with packed_dir"
            ) from error

    def _reuse(self) -> bool:
        """Opens the finished file of an earlier start if it is whole and ours; a damaged one is packed again."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            found = file.read(len(self._header))
        if found != self._header or self.path.stat().st_size != self.file_bytes:
            self.notice = f"the packed file {self.path} was damaged or of another checkpoint, so it is packed again"
            self.path.unlink()
            return False
        self._open()
        return True

    def _create(self) -> None:
        """Starts the file anew, over what a killed start may have left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        writer = os.open(self._partial, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(writer)
            raise MoepicError(f"{self._partial} is being written by another MoEpic; wait until that is done") from None
        self._writer = writer
        os.ftruncate(writer, 0)
        if shutil.disk_usage(self.path.parent).free < self.file_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(self._header, 0)
        os.ftruncate(writer, self.file_bytes)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        assert self._writer is not None
        view = memoryview(data)
        while view:
            written = os.pwrite(self._writer, view, offset)
            view, offset = view[written:], offset + written

    def _open(self) -> None:
        try:
            self._fd, self._direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:  # the file system has no direct I/O (tmpfs, some network mounts)
            self._fd, self._direct = os.open(self.path, os.O_RDONLY), False
            self.notice = f"{self.path.parent} has no direct I/O, so reads go through the page cache"
        with contextlib.suppress(OSError):  # only advice: our reads are large and random
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)


def _header(spec: ModelSpec, dtype: torch.dtype) -> bytes:
    """The first bytes of a packed file: a length, and all that decides whether the file can be used."""
    text = json.dumps({
        "magic": _MAGIC,
        "fingerprint": spec.fingerprint,
        "dtype": str(dtype),
        "layers": [[layer.num_experts, layer.neurons, layer.matrices, layer.hidden] for layer in spec.moe_layers],
    }, sort_keys=True).encode()  # fmt: skip
    return len(text).to_bytes(8, "little") + text


def default_packed_folder() -> Path:
    """Where packed files live unless the settings say otherwise."""
    return user_folder() / "packed"


def check_layout(layer: MoeLayer, fused: Mapping[str, Tensor], layout: FusedLayout, name: str) -> None:
    """Raises BadCheckpoint when a fused tensor has not the shape that the geometry promises."""
    for key, shape in layout.shapes(layer).items():
        found = tuple(fused[key].shape) if key in fused else None
        if found != shape:
            raise BadCheckpoint(f"{name}.{key} should be {list(shape)} but is {found}; the checkpoint is damaged")
