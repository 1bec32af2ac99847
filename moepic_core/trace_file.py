"""Routing traces on disk: what serving recorded, kept for the next session's planner, for benchmarks and for people.

An ordinary compressed .npz (`numpy.load` opens it): four arrays and a JSON header. Ids are one byte each where they
fit, with 255 for "none". A file is not believed: names, dtypes, shapes and values are checked, nothing is unpickled or
evaluated, no more is unpacked than fits the limit, and what does not hold together raises BadCheckpoint.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadCheckpoint, BadSettings
from .routing import RoutingTrace
from .units import format_bytes

_VERSION = 1
_MAX_BYTES = 2**30  # of one array, unpacked: a million tokens of the largest models
_NONE = 255  # in arrays of one byte
_ARRAYS = ("experts", "guesses", "replies", "subjects")
_NPY_HEADER = re.compile(
    r"\{'descr': '(..\d)', 'fortran_order': False, 'shape': \((\d{1,9}(?:, \d{1,9})*),?\), \} *\n", re.ASCII
)


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Writes `trace` to `path`, in place of a file that is there. Raises BadSettings when that is not possible."""
    header = {
        "version": _VERSION,
        "num_experts": trace.num_experts,
        "source": trace.source,
        "subject_names": trace.subject_names,
    }
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                experts=_packed(trace.experts, trace.num_experts),
                guesses=_packed(trace.guesses, trace.num_experts),
                replies=trace.replies.astype("<i4"),
                subjects=trace.subjects.astype("<i2"),
            )
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise BadSettings(f"{path} cannot be written: {error.strerror}; choose another place") from error


def load_trace(path: Path) -> RoutingTrace:
    """The trace that `save_trace` wrote to `path`. Raises BadCheckpoint for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, wanted = sorted(archive.namelist()), [f"{name}.npy" for name in sorted(("header", *_ARRAYS))]
            if names != wanted:
                raise _damaged(path, f"it must hold {', '.join(wanted)}, found {str(names)[:200]}")
            header = _read_header(path, archive)
            ids = _id_dtype(header["num_experts"])
            dtypes = dict(zip(_ARRAYS, (ids, ids, "<i4", "<i2"), strict=True))
            arrays = {name: _read_array(path, archive, name, dtype) for name, dtype in dtypes.items()}
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise _damaged(path, f"it cannot be unpacked ({str(error) or 'it ends too soon'})") from error
    _check_shapes(path, arrays, len(header["num_experts"]))
    _check_replies(path, arrays["replies"], arrays["subjects"], len(header["subject_names"]))
    return RoutingTrace(
        _unpacked(path, "experts", arrays["experts"], header["num_experts"]),
        _unpacked(path, "guesses", arrays["guesses"], header["num_experts"]),
        tuple(header["num_experts"]),
        arrays["replies"],
        arrays["subjects"],
        tuple(header["subject_names"]),
        header["source"],
    )


def _id_dtype(num_experts: Sequence[int]) -> str:
    return "|u1" if max(num_experts) <= _NONE else "<i2"


def _packed(experts: NDArray[np.int16], num_experts: Sequence[int]) -> NDArray[Any]:
    return np.where(experts < 0, _NONE, experts).astype("|u1") if max(num_experts) <= _NONE else experts.astype("<i2")


def _unpacked(path: Path, name: str, stored: NDArray[Any], num_experts: Sequence[int]) -> NDArray[np.int16]:
    """int16 with -1 for none. Every id must be one of its layer's experts, and no token may have one twice."""
    experts = stored.astype(np.int16)
    if stored.dtype == np.uint8:
        experts[stored == _NONE] = -1
    limits = np.array(num_experts)[:, None]
    if ((experts < -1) | (experts >= limits)).any():
        raise _damaged(path, f"its {name} hold ids that are no experts")
    ordered = np.sort(experts, axis=2)
    if ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any():
        raise _damaged(path, f"its {name} name an expert twice for one token")
    return experts


def _read_header(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        header = json.loads(_read_array(path, archive, "header", "|u1").tobytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise BadCheckpoint(
            f"{path.name} is a trace of version {version!r}, this MoEpic reads {_VERSION}; record it again"
        )
    counts, names = header.get("num_experts"), header.get("subject_names")
    if not isinstance(counts, list) or not counts or not all(type(n) is int and 0 < n < 2**15 for n in counts):
        raise _damaged(path, f"its header needs num_experts of 1 to 32767 per layer, found {str(counts)[:100]}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in [*names, header.get("source")]):
        raise _damaged(path, "its header needs a source and a list of subject_names")
    return header


def _read_array(path: Path, archive: zipfile.ZipFile, name: str, dtype: str) -> NDArray[Any]:
    """The array `name`, whose .npy header is read but never evaluated."""
    method = archive.getinfo(f"{name}.npy").compress_type
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _damaged(path, f"{name} must be stored or deflated, found method {method}")
    with archive.open(f"{name}.npy") as file:
        prefix = file.read(10)
        text = file.read(int.from_bytes(prefix[8:], "little")).decode("latin-1")
        match = _NPY_HEADER.fullmatch(text)
        if prefix[:8] != b"\x93NUMPY\x01\x00" or match is None or match[1] != dtype:
            raise _damaged(path, f"{name} must be an array of {dtype}, found {(match[1] if match else text[:80])!r}")
        shape = tuple(map(int, match[2].split(", ")))
        wanted = prod(shape) * np.dtype(dtype).itemsize
        if wanted > _MAX_BYTES:
            raise _damaged(path, f"{name} has {format_bytes(wanted)}, allowed are {format_bytes(_MAX_BYTES)}")
        data = file.read(wanted + 1)
    if len(data) != wanted:
        raise _damaged(path, f"{name} of shape {shape} needs {wanted} bytes, found {len(data)} or more")
    return np.frombuffer(data, dtype).reshape(shape)


def _check_shapes(path: Path, arrays: dict[str, NDArray[Any]], layers: int) -> None:
    tokens = len(arrays["replies"])
    for name, array in arrays.items():
        wanted = (tokens, layers) if name in ("experts", "guesses") else (tokens,)
        if array.ndim != 2 * len(wanted) - 1 or array.shape[: len(wanted)] != wanted:
            raise _damaged(path, f"{name} must be for {tokens} tokens and {layers} layers, found shape {array.shape}")


def _check_replies(path: Path, replies: NDArray[Any], subjects: NDArray[Any], num_subjects: int) -> None:
    if (np.diff(replies.astype(np.int64)) < 0).any():
        raise _damaged(path, "its replies are not in order")
    if ((subjects < 0) | (subjects >= num_subjects)).any():
        raise _damaged(
            path, f"its subjects must be 0 to {num_subjects - 1}, found {subjects.min()} to {subjects.max()}"
        )


def _damaged(path: Path, detail: str) -> BadCheckpoint:
    return BadCheckpoint(f"{path.name} is no sound routing trace: {detail}; record it again")
