"""The host tier of the token embedding: the whole table in RAM, or in its checkpoint's file, and rows of it on demand.

A token reads one row of a few KB, so the table takes none of the device's memory. `hf.embedding` asks for the rows of a
pass. They are bit by bit those of the table that Transformers would have loaded. What a row means is not known here.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from .errors import BadCheckpoint
from .safetensors_header import TensorInfo


class EmbeddingRows(Protocol):
    def gather(self, ids: list[int]) -> Tensor:
        """Rows `[len(ids), hidden]` in fresh host memory. Raises IndexError for an id outside the table."""

    def close(self) -> None: ...


class RamRows:
    """The table `[vocabulary, hidden]` in RAM.

    `pinned`: what is gathered is page-locked, so that its copy to a GPU does not hold up the host. The table itself is
    not, since only the CPU reads it.
    """

    def __init__(self, table: Tensor, pinned: bool) -> None:
        self._table = table
        self._pinned = pinned

    def gather(self, ids: list[int]) -> Tensor:
        rows = embedding(torch.tensor(ids), self._table)
        # Torch gives such memory out again only when the copies from it are done.
        return rows.pin_memory() if self._pinned else rows

    def close(self) -> None:
        self._table = self._table.new_empty(0, self._table.shape[1])


class FileRows:
    """The table in its checkpoint's file; rows become `dtype` as the loader would convert the whole.

    The file stays open, so it may be replaced or deleted meanwhile. If it is overwritten in place or cannot be read any
    more, `gather` raises BadCheckpoint: nothing is answered from bytes that are not the model's.
    """

    def __init__(self, info: TensorInfo, stored: torch.dtype, dtype: torch.dtype) -> None:
        self._info = info
        self._stored = stored
        self._dtype = dtype
        self._num_rows, hidden = info.shape
        self._row_bytes = hidden * stored.itemsize
        with self._refusals():
            self._fd = os.open(info.file, os.O_RDONLY)
            self.close = weakref.finalize(self, os.close, self._fd)  # also when loading ends half-way
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # rows are far apart
            self._state = self._look()

    def gather(self, ids: list[int]) -> Tensor:
        wanted = sorted(set(ids))
        if wanted[0] < 0 or wanted[-1] >= self._num_rows:
            raise IndexError(f"index out of range: rows {wanted[0]} to {wanted[-1]} of {self._num_rows}")
        rows = torch.empty(len(wanted), self._row_bytes, dtype=torch.uint8)
        with self._refusals():
            if len(wanted) > 1:  # a disk serves many requests at once, so all are made before the first is awaited
                for token in wanted:
                    os.posix_fadvise(self._fd, self._place(token), self._row_bytes, os.POSIX_FADV_WILLNEED)
            for row, token in zip(rows.numpy(), wanted, strict=True):
                self._read(row.data, self._place(token))
            changed = self._look() != self._state
        if changed:
            raise BadCheckpoint(f"{self._info.file} was overwritten while its model is loaded; load the model again")
        token_to_row = {token: row for row, token in enumerate(wanted)}
        return rows.view(self._stored).to(self._dtype)[[token_to_row[token] for token in ids]]

    def _place(self, token: int) -> int:
        return self._info.start + token * self._row_bytes

    def _read(self, target: memoryview, position: int) -> None:
        while target:
            count = os.preadv(self._fd, [target], position)
            if not count:
                raise BadCheckpoint(f"{self._info.file} ended early; it was overwritten, load the model again")
            target, position = target[count:], position + count

    def _look(self) -> tuple[int, int]:
        """Changes when anybody writes to the file."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadCheckpoint(f"{self._info.file} cannot be read: {error.strerror}; check the disk") from error
