"""Headers of safetensors files are not believed: exact answers for each lie, and random bytes by the thousand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moepic_core.errors import BadCheckpoint
from moepic_core.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header


def entry(start: Any, stop: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def write(path: Path, table: Any, num_data_bytes: int) -> Path:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return write_new(path, len(header).to_bytes(8, "little") + header + bytes(num_data_bytes))


def write_new(path: Path, content: bytes) -> Path:
    path.unlink(missing_ok=True)  # some file systems flush a file that is overwritten, which is slow
    path.write_bytes(content)
    return path


def test_a_file_written_by_the_safetensors_library_is_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b.weight": torch.arange(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }
    save_file(written, path, metadata={"format": "pt"})
    tensors = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b.weight": ("BF16", (4,)),
        "empty": ("F32", (0, 5)),
        "scalar": ("I64", ()),
        "mask": ("BOOL", (2,)),
    }
    content = path.read_bytes()
    for name, info in tensors.items():
        assert content[info.start : info.stop] == written[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert info.num_bytes == info.stop - info.start
        assert info.file == path


def test_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"late": entry(8, 16), "early": entry(0, 8)}, 16)
    data_start = path.stat().st_size - 16
    assert read_header(path)["late"] == TensorInfo("F32", (2,), data_start + 8, data_start + 16, path)


LIES = {
    "no dict": ([1], 0, "its header must be a JSON object, found list"),
    "bad json": (b'{"a":', 0, "its header is not valid JSON"),
    "bad utf-8": (b'{"\xff":1}', 0, "its header is not valid JSON"),
    "nested beyond reason": (b"[" * 200_000, 0, "its header is not valid JSON"),
    "entry no dict": ({"a": 3}, 0, "tensor 'a' must be described by a JSON object, found int"),
    "unknown dtype": (
        {"a": entry(0, 8, dtype="F3")},
        8,
        "x.safetensors: tensor 'a' has dtype 'F3', which is not known",
    ),
    "dtype no text": ({"a": entry(0, 8, dtype=[])}, 8, "tensor 'a' has dtype [], which is not known"),
    "negative shape": ({"a": entry(0, 8, [-2])}, 8, "tensor 'a' needs a shape of whole numbers from 0, found [-2]"),
    "broken shape": ({"a": entry(0, 8, [2.0])}, 8, "tensor 'a' needs a shape of whole numbers from 0, found [2.0]"),
    "true as shape": ({"a": entry(0, 4, [True])}, 4, "needs a shape of whole numbers from 0, found [True]"),
    "huge shape": ({"a": entry(0, 8, [2**63])}, 8, "needs a shape of whole numbers from 0"),
    "many dimensions": ({"a": entry(0, 8, [1] * 65)}, 8, "needs a shape of whole numbers from 0"),
    "negative start": ({"a": entry(-8, 0)}, 8, "tensor 'a' needs two ascending data_offsets, found [-8, 0]"),
    "descending": ({"a": entry(8, 0)}, 8, "tensor 'a' needs two ascending data_offsets, found [8, 0]"),
    "huge offsets": ({"a": entry(2**62, 2**62 + 8)}, 8, "tensor 'a' leaves a gap after the header"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs two ascending data_offsets, found None"),
    "too few bytes": ({"a": entry(0, 7)}, 7, "tensor 'a' (F32 [2]) needs 8 bytes, found 7"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor 'b' overlaps with 'a': wanted start"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "tensor 'b' leaves a gap after 'a': wanted start"),
    "trailing bytes": ({"a": entry(0, 8)}, 9, "it is longer than its header says: wanted"),
    "truncated": ({"a": entry(0, 8)}, 7, "it is truncated: wanted"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named(lie: str, tmp_path: Path) -> None:
    table, num_data_bytes, message = LIES[lie]
    path = write(tmp_path / "x.safetensors", table, num_data_bytes)
    with pytest.raises(BadCheckpoint) as raised:
        read_header(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith("x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it needs 8 bytes for the header's length, found 0"),
        (b"1234567", "it needs 8 bytes for the header's length, found 7"),
        (
            (-1).to_bytes(8, "little", signed=True),
            "its header claims 18446744073709551615 bytes, at most 0 are possible",
        ),
        ((3).to_bytes(8, "little") + b"{}", "its header claims 3 bytes, at most 2 are possible"),
    ],
)
def test_impossible_lengths_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match="download the file again") as raised:
        read_header(path)
    assert message in str(raised.value)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no room
    with pytest.raises(BadCheckpoint, match="claims 100000001 bytes, at most 100000000 are possible"):
        read_header(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="No such file or directory; check the file and its permissions"):
        read_header(tmp_path / "absent.safetensors")


def check_success_or_bad_checkpoint(path: Path) -> None:
    """Whatever the bytes: BadCheckpoint, or tensors that fill the file from the header's end to its own."""
    try:
        tensors = read_header(path)
    except BadCheckpoint:
        return
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    assert sum(info.num_bytes for info in tensors.values()) == len(content) - data_start
    assert all(data_start <= info.start <= info.stop <= len(content) for info in tensors.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OFTEN_VALID = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4"]) | JSON,
            "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
            "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | JSON,
        }
    )
    | JSON,
    max_size=3,
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=st.binary(max_size=64))
def test_random_files_never_surprise(content: bytes, tmp_path: Path) -> None:
    check_success_or_bad_checkpoint(write_new(tmp_path / "x.safetensors", content))


@FUZZ
@given(table=OFTEN_VALID | JSON, num_data_bytes=st.integers(0, 24))
def test_random_tables_never_surprise(table: Any, num_data_bytes: int, tmp_path: Path) -> None:
    check_success_or_bad_checkpoint(write(tmp_path / "x.safetensors", table, num_data_bytes))


@FUZZ
@given(position=st.integers(0, 200), bits=st.integers(1, 255))
def test_one_damaged_byte_never_surprises(position: int, bits: int, tmp_path: Path) -> None:
    table = {"a": entry(0, 8), "b": entry(8, 20, [3, 1]), "__metadata__": {"format": "pt"}}
    path = write(tmp_path / "x.safetensors", table, 20)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= bits
    check_success_or_bad_checkpoint(write_new(path, bytes(content)))
