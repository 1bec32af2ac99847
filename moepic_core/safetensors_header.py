"""Read the header of one safetensors file and believe nothing in it.

A safetensors file is an 8-byte little-endian length, a JSON table of tensors and their bytes, back to back.
`shards` calls this for every file of a checkpoint before anything is allocated; only headers are read, never a weight.
Either every tensor lies where the table says, in full and without gaps, or BadCheckpoint names file, tensor, wanted
and found. What the tensors mean is not known here.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from .errors import BadCheckpoint
from .units import format_bytes

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
ITEMSIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where one tensor lies. A named tuple, because a checkpoint has up to a hundred thousand of them."""

    dtype: str  # a key of ITEMSIZES
    shape: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file
    stop: int  # one past the last byte
    file: Path

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of the file at `path` by name. Raises BadCheckpoint when the header is not exactly as it must be."""
    text, file_size = _header_text(path)
    data_start = 8 + len(text)
    try:
        table = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise _damaged(path, f"its header must be a JSON object, found {type(table).__name__}")
    table.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in table.items()}
    _check_cover(path, tensors, data_start, file_size)
    return tensors


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the size of the whole file."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            if file_size < 8:
                raise _damaged(path, f"it needs 8 bytes for the header's length, found {file_size}")
            length = int.from_bytes(file.read(8), "little")
            allowed = min(file_size - 8, MAX_HEADER_BYTES)
            if length > allowed:
                raise _damaged(path, f"its header claims {length} bytes, at most {allowed} are possible")
            return file.read(length), file_size
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _damaged(path, f"tensor {name!r} must be described by a JSON object, found {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        allowed = ", ".join(ITEMSIZES)
        raise BadCheckpoint(f"{path.name}: tensor {name!r} has dtype {dtype!r}, which is not known; allowed: {allowed}")
    if not _are_counts(shape):
        raise _damaged(path, f"tensor {name!r} needs a shape of whole numbers from 0, found {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"tensor {name!r} needs two ascending data_offsets, found {offsets!r}")
    wanted, found = prod(shape) * ITEMSIZES[dtype], offsets[1] - offsets[0]
    if wanted != found:
        raise _damaged(path, f"tensor {name!r} ({dtype} {shape}) needs {wanted} bytes, found {found}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1], path)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    """Whether `values` is a list of at most 64 (torch's limit) whole numbers from 0 to 2⁶³."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    # Exactly int, because JSON's true is an int to Python too.
    return not values or ({*map(type, values)} == {int} and min(values) >= 0 and max(values) < 2**63)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data_start: int, file_size: int) -> None:
    """The tensors must fill the bytes after the header exactly: no overlap, no gap, nothing beyond or after the end."""
    position, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            fault = "overlaps with" if info.start < position else "leaves a gap after"
            raise _damaged(path, f"tensor {name!r} {fault} {previous}: wanted start {position}, found {info.start}")
        position, previous = info.stop, repr(name)
    if position != file_size:
        state = "truncated" if position > file_size else "longer than its header says"
        raise _damaged(path, f"it is {state}: wanted {position} bytes, found {file_size} ({format_bytes(file_size)})")


def _damaged(path: Path, detail: str) -> BadCheckpoint:
    return BadCheckpoint(f"{path.name} is damaged: {detail}; download the file again")
