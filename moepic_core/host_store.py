"""The host tier: a complete, immutable copy of all expert records, in RAM or in a packed file.

Filled once while the model loads, one layer at a time, then only read. Because it never changes and misses nothing, evicting
from the device is forgetting. `source()` describes a segment for a transfer; nothing here copies toward the device.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .errors import BadCheckpoint, OutOfRoom
from .packing import FusedLayout, Segment, align, aligned_bytes, pack_expert, record_stride, rows_of
from .spec import ModelSpec, MoeLayer
from .transfer.base import FileSource, MemorySource, Source
from .transfer.pinning import Pinned, pin
from .units import format_bytes

_MAGIC = "moepic-packed-1"


class HostStore(Protocol):
    complete: bool  # True: `add_layer` is not needed (a packed file from an earlier start)
    notice: str | None  # something that the user should know, such as memory that could not be pinned

    def add_layer(self, layer: int, fused: Mapping[str, Tensor], layout: FusedLayout) -> None:
        """Packs one layer from its two fused tensors (shapes: `FusedLayout.shapes`)."""

    def seal(self) -> None:
        """Called once after the last layer: from here on the store is complete and immutable."""

    def source(self, layer: int, expert: int, segment: Segment) -> Source: ...

    def close(self) -> None: ...


class RamStore:
    """Records in host memory; page-locked when `pinned`, so that a GPU reads them at full speed.

    When pinning fails the memory stays pageable and `notice` says so.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, pinned: bool) -> None:
        self.layers = spec.moe_layers
        self.dtype = dtype
        self.complete = False
        self.notice: str | None = None
        self._want_pinned = pinned
        self._pins: list[Pinned] = []
        self._records: list[Tensor | None] = [None] * len(self.layers)

    def add_layer(self, layer: int, fused: Mapping[str, Tensor], layout: FusedLayout) -> None:
        geometry = self.layers[layer]
        stride = record_stride(geometry)
        records = aligned_bytes(geometry.num_experts * stride)  # [experts * stride]
        for expert in range(geometry.num_experts):
            record = rows_of(records[expert * stride :], geometry, self.dtype, 0, geometry.neurons)
            pack_expert(record, fused[layout.input_name][expert], fused["down_proj"][expert], layout)
        self._records[layer] = records
        if self._want_pinned:
            self._pin(records)

    def seal(self) -> None:
        missing = [position for position, records in enumerate(self._records) if records is None]
        assert not missing, f"layers {missing} were never packed"
        self.complete = True

    def source(self, layer: int, expert: int, segment: Segment) -> Source:
        records = self._records[layer]
        assert records is not None, layer
        base = expert * record_stride(self.layers[layer])
        return MemorySource(records[base + segment.start : base + segment.stop])

    def close(self) -> None:
        for pinned in self._pins:
            pinned.release()
        self._pins.clear()
        self._records = [None] * len(self.layers)

    def _pin(self, records: Tensor) -> None:
        pinned = pin(records)
        if pinned.error is None:
            self._pins.append(pinned)
            return
        self._want_pinned = False
        held = sum(pin.nbytes for pin in self._pins)
        self.notice = (
            f"only {format_bytes(held)} of expert memory could be page-locked ({pinned.error}); the rest is pageable and "
            f"travels slower; raise the locked-memory limit (ulimit -l) or free host memory"
        )


class DiskStore:
    """Records in one packed file, read with direct I/O where the file system allows it.

    The file is written beside its final name and renamed when complete, so a killed start leaves nothing that looks usable.
    A complete file of the same checkpoint, dtype and geometry is used again.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, folder: Path) -> None:
        self.layers = spec.moe_layers
        self.dtype = dtype
        self.notice: str | None = None
        self.path = folder / f"{Path(spec.path).name}-{spec.fingerprint[:16]}-{str(dtype).removeprefix('torch.')}.moepic"
        self._partial = self.path.with_suffix(".partial")
        self._header = {
            "magic": _MAGIC,
            "fingerprint": spec.fingerprint,
            "dtype": str(dtype),
            "layers": [[geo.num_experts, geo.neurons, geo.matrices, geo.hidden] for geo in self.layers],
        }
        sizes = [geo.num_experts * record_stride(geo) for geo in self.layers]
        start = align(len(self._header_bytes()) + 8)
        self._starts = [start + sum(sizes[:position]) for position in range(len(sizes))]
        self.file_bytes = start + sum(sizes)
        self._fd: int | None = None
        self._direct = False
        self._writer: int | None = None
        self.complete = self._reuse()
        if not self.complete:
            self._create()

    def add_layer(self, layer: int, fused: Mapping[str, Tensor], layout: FusedLayout) -> None:
        assert self._writer is not None
        geometry = self.layers[layer]
        buffer = aligned_bytes(record_stride(geometry))
        buffer[geometry.expert_bytes :].zero_()
        record = rows_of(buffer, geometry, self.dtype, 0, geometry.neurons)
        for expert in range(geometry.num_experts):
            pack_expert(record, fused[layout.input_name][expert], fused["down_proj"][expert], layout)
            self._write(buffer, self._starts[layer] + expert * buffer.numel())

    def seal(self) -> None:
        if self.complete:
            return
        assert self._writer is not None
        os.fsync(self._writer)
        os.posix_fadvise(self._writer, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._writer)
        self._writer = None
        os.replace(self._partial, self.path)
        self._open()
        self.complete = True

    def source(self, layer: int, expert: int, segment: Segment) -> Source:
        assert self._fd is not None
        offset = self._starts[layer] + expert * record_stride(self.layers[layer]) + segment.start
        return FileSource(self._fd, offset, segment.nbytes, str(self.path), self._direct)

    def close(self) -> None:
        for fd in (self._fd, self._writer):
            if fd is not None:
                os.close(fd)
        if self._writer is not None:
            self._partial.unlink(missing_ok=True)
        self._fd = self._writer = None

    def _header_bytes(self) -> bytes:
        return json.dumps(self._header, sort_keys=True).encode()

    def _reuse(self) -> bool:
        """Opens the finished file of an earlier start if it is whole and ours; a damaged one is packed again."""
        if not self.path.is_file():
            return False
        header = self._header_bytes()
        with self.path.open("rb") as file:
            found = file.read(8 + len(header))
        if found[8:] != header or self.path.stat().st_size != self.file_bytes:
            self.notice = f"the packed file {self.path} was damaged or of another checkpoint, so it is packed again"
            self.path.unlink()
            return False
        self._open()
        return True

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < self.file_bytes:
                raise self._disk_full(free)
            self._writer = os.open(self._partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            header = self._header_bytes()
            self._write_bytes(len(header).to_bytes(8, "little") + header, 0)
            os.ftruncate(self._writer, self.file_bytes)
        except OSError as error:
            raise OutOfRoom(
                f"cannot write packed experts to {self.path.parent}: {error.strerror}; choose another folder with packed_dir"
            ) from error

    def _write(self, buffer: Tensor, offset: int) -> None:
        try:
            self._write_bytes(memoryview(buffer.numpy()), offset)
        except OSError as error:
            self.close()
            raise self._disk_full(shutil.disk_usage(self.path.parent).free) from error

    def _write_bytes(self, data: bytes | memoryview, offset: int) -> None:
        assert self._writer is not None
        view = memoryview(data)
        while view:
            written = os.pwrite(self._writer, view, offset)
            view, offset = view[written:], offset + written

    def _disk_full(self, free: int) -> OutOfRoom:
        return OutOfRoom(
            f"packing the experts needs {format_bytes(self.file_bytes)} in {self.path.parent}, {format_bytes(free)} is free; "
            f"free some space or choose another folder with packed_dir"
        )

    def _open(self) -> None:
        try:
            self._fd, self._direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:  # the file system has no direct I/O (tmpfs, some network mounts)
            self._fd, self._direct = os.open(self.path, os.O_RDONLY), False
            self.notice = f"{self.path.parent} has no direct I/O, so reads go through the page cache"
        with contextlib.suppress(OSError):  # only advice: our reads are large and random
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)


def default_packed_folder() -> Path:
    """Where packed files live unless the settings say otherwise."""
    base = os.environ.get("MOEPIC_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "moepic"
    return Path(base).expanduser() / "packed"


def check_layout(layer: MoeLayer, fused: Mapping[str, Tensor], layout: FusedLayout, name: str) -> None:
    """Raises BadCheckpoint when a fused tensor has not the shape that the geometry promises."""
    for key, shape in layout.shapes(layer).items():
        found = tuple(fused[key].shape) if key in fused else None
        if found != shape:
            raise BadCheckpoint(f"{name}.{key} should be {list(shape)} but is {found}; the checkpoint is damaged")

