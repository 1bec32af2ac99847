"""A checkpoint's tensors by name, each read from its file at the moment it is asked for.

`hf.loading` hands the mapping to Transformers as a state dict, which calls `tensor[...]` once per tensor, one weight at
a time. Bytes are read straight into the tensor's memory, not mapped from the file: resident memory grows by the tensor
and nothing else, and no second copy is made. The disk is kept busy meanwhile with what comes next in the file. Neither
names nor shapes are interpreted here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import EllipsisType

import torch

from .errors import BadCheckpoint, Cancelled
from .safetensors_header import TensorInfo

CHUNK_BYTES = 8 << 20  # large enough to read at full speed, small enough that a stop takes effect within milliseconds
SPARE_BYTES = 1 << 20  # from here on memory that was touched before is worth keeping
AHEAD_BYTES = 64 << 20  # enough to keep a disk busy while a layer is packed (docs/LOG.md)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class ReadAhead:
    """Asks the system to bring what follows in a file into its page cache, while what was read is being packed.

    Only advice: wrong when tensors are not asked for in the order of the file, and then no harm but a little reading.
    """

    def __init__(self, ahead_bytes: int) -> None:
        self.ahead_bytes = ahead_bytes
        self._windows: dict[Path, range] = {}  # file to the bytes that were asked for last
        self._lock = Lock()  # two threads read one tensor

    def before(self, path: Path, fd: int, position: int) -> None:
        """To be called before reading at `position`; asks at most once per half of `ahead_bytes`."""
        if not self.ahead_bytes:
            return
        with self._lock:
            window = self._windows.get(path, range(0))
            if position in window and window.stop - position > self.ahead_bytes // 2:
                return
            start, stop = (window.stop if position in window else position), position + self.ahead_bytes
            self._windows[path] = range(position, stop)
        with contextlib.suppress(OSError):  # some file systems take no advice
            os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_WILLNEED)


class Buffers:
    """Memory for what is read. That of a tensor which is gone is lent again, since touching fresh memory takes about as
    long as filling it from a disk: a layer's experts are packed elsewhere, and the next layer's have the same sizes.
    """

    def __init__(self) -> None:
        self._spare: dict[int, torch.Tensor] = {}  # bytes to memory; single operations, which threads may mix
        self._closed = False

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised bytes `[num_bytes]`. They come back by themselves when no tensor uses them any more."""
        if num_bytes < SPARE_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        memory = self._spare.pop(num_bytes, None)
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        lent = memory.numpy()
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent)

    def close(self) -> None:
        """From here on memory is freed when its tensor is gone."""
        self._closed = True
        self._spare.clear()

    def _give_back(self, memory: torch.Tensor) -> None:
        for num_bytes in list(self._spare)[:-1]:  # at most two stay: a layer has two fused tensors
            self._spare.pop(num_bytes, None)
        if not self._closed:
            self._spare[memory.numel()] = memory


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor that is still in its file. `tensor[...]` reads it."""

    info: TensorInfo
    on_read: Callable[[int], None]  # told the bytes of each chunk, may raise
    ahead: ReadAhead
    buffers: Buffers
    on_begin: Callable[[], None]  # told that the tensor is asked for

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.info.shape)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.info.dtype]

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        """The whole tensor in CPU memory of its own. Raises BadCheckpoint when the file cannot be read to the end."""
        assert index is Ellipsis, f"a checkpoint tensor is read whole, with [...], not with [{index!r}]"
        self.on_begin()
        buffer = self.buffers.take(self.info.num_bytes)
        target = buffer.numpy().data
        offsets = range(0, len(target), CHUNK_BYTES)
        try:
            # Opening anew costs microseconds and leaves nothing to close or to share between loading threads.
            with self.info.file.open("rb", buffering=0) as file:
                self._read(file.fileno(), target, offsets)
        except OSError as error:
            raise BadCheckpoint(f"{self.info.file} cannot be read: {error.strerror}; check the disk") from error
        return buffer.view(self.dtype).view(self.info.shape)

    def _read(self, fd: int, target: memoryview, offsets: range) -> None:
        """All chunks, two at a time: fresh memory costs about as much to touch as a disk takes to fill it."""
        if len(offsets) < 2:
            for offset in offsets:
                self.on_read(self._read_chunk(fd, target, offset))
            return
        with ThreadPoolExecutor(2) as pool:
            for count in pool.map(lambda offset: self._read_chunk(fd, target, offset), offsets):
                self.on_read(count)

    def _read_chunk(self, fd: int, target: memoryview, offset: int) -> int:
        chunk = target[offset : offset + CHUNK_BYTES]
        done = 0
        while done < len(chunk):
            position = self.info.start + offset + done
            self.ahead.before(self.info.file, fd, position)
            count = os.preadv(fd, [chunk[done:]], position)
            if not count:
                missing = len(target) - offset - done
                raise BadCheckpoint(f"{self.info.file} ended {missing} bytes early; it changed while loading")
            done += count
        return done


class LazyTensors(Mapping[str, CheckpointTensor]):
    """Tensor name to CheckpointTensor, in the order of `tensors`.

    `progress` is called with the bytes of every chunk that was read. Before each chunk is reported `cancelled` is
    asked; when it says yes, reading stops with Cancelled. `ahead_bytes` is 0 when most of a file will not be read.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        progress: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._tensors = tensors
        self._progress = progress
        self._cancelled = cancelled
        self._ahead = ReadAhead(ahead_bytes)
        self._buffers = Buffers()
        self.unread = set(tensors)  # names of those that nobody has asked for yet

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what `progress` adds up to when every tensor is read once."""
        return sum(info.num_bytes for info in self._tensors.values())

    def close(self) -> None:
        """Called when all is read: keeps no memory for more."""
        self._buffers.close()

    def forget(self) -> None:
        """Has the system drop the files from its page cache, for a process that needs the memory itself."""
        for path in {info.file for info in self._tensors.values()}:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def __getitem__(self, name: str) -> CheckpointTensor:
        begin = functools.partial(self.unread.discard, name)
        return CheckpointTensor(self._tensors[name], self._on_read, self._ahead, self._buffers, begin)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _on_read(self, count: int) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("loading was stopped")
        if self._progress is not None:
            self._progress(count)
