"""The host tier on a disk: one packed file of expert records, made at the first start and used again by later ones.

`assembly` makes it for the disk link, which runs models that are larger than the memory. Whatever a killed start or a
full disk leaves behind is never taken for a complete file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .errors import MoepicError, OutOfRoom
from .folders import user_folder
from .geometry import Segment, record_stride
from .packing import NUM_FUSED, FusedLayout, aligned_bytes, pack_expert, rows_of
from .spec import ModelSpec
from .transfer.base import FileSource, Source
from .units import align, format_bytes

_MAGIC = "moepic-packed-1"


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
        if len(parts) < NUM_FUSED:
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
