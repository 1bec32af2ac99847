"""trace_file.py: any trace comes back as it was, and no other file gets in."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepic_core.errors import BadCheckpoint, BadSettings, MoepicError
from moepic_core.routing import RoutingTrace
from moepic_core.trace_file import load_trace, save_trace

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def traces(draw):
    """Layers of unlike size on both sides of what one byte can name, tokens with fewer experts, no tokens at all."""
    num_experts = tuple(draw(st.lists(st.sampled_from([1, 3, 60, 254, 255, 256, 300]), min_size=1, max_size=3)))
    tokens, k, depth = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3))

    def table(width):
        array = np.full((tokens, len(num_experts), width), -1, np.int16)
        for row in np.ndindex(array.shape[:2]):
            ids = draw(st.lists(st.integers(0, num_experts[row[1]] - 1), max_size=width, unique=True))
            array[row][: len(ids)] = ids
        return array

    names = tuple(draw(st.lists(st.text(max_size=5), min_size=1, max_size=3)))
    numbers = st.lists(st.integers(0, 2**31 - 1), min_size=tokens, max_size=tokens)
    subjects = st.lists(st.integers(0, len(names) - 1), min_size=tokens, max_size=tokens)
    return RoutingTrace(
        table(k), table(depth), num_experts, np.array(sorted(draw(numbers)), np.int32),
        np.array(draw(subjects), np.int16), names, draw(st.text(max_size=20)),
    )  # fmt: skip


def assert_same(found, wanted):
    for name in ("experts", "guesses", "replies", "subjects"):
        one, other = getattr(found, name), getattr(wanted, name)
        np.testing.assert_array_equal(one, other, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
    for name in ("num_experts", "subject_names", "source"):
        assert getattr(found, name) == getattr(wanted, name)


@FUZZ
@given(trace=traces())
def test_a_trace_comes_back_as_it_was(trace, tmp_path):
    path = tmp_path / "routing.npz"
    save_trace(trace, path)
    assert_same(load_trace(path), trace)
    assert [file.name for file in tmp_path.iterdir()] == ["routing.npz"]


def small_trace():
    return RoutingTrace(
        experts=np.array([[[0, 2], [1, -1]], [[2, 1], [0, 1]]], np.int16),
        guesses=np.array([[[0], [-1]], [[2], [0]]], np.int16),
        num_experts=(3, 2),
        replies=np.array([4, 5], np.int32),
        subjects=np.array([0, 1], np.int16),
        subject_names=("code", "poems"),
        source="test",
    )


def test_numpy_opens_it_and_ids_take_one_byte(tmp_path):
    save_trace(small_trace(), tmp_path / "routing.npz")
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as arrays:
        assert arrays["experts"].tolist() == [[[0, 2], [1, 255]], [[2, 1], [0, 1]]]
        assert arrays["experts"].dtype == arrays["guesses"].dtype == np.uint8
        header = json.loads(arrays["header"].tobytes())
    assert header == {"version": 1, "num_experts": [3, 2], "source": "test", "subject_names": ["code", "poems"]}


HEADER = {"version": 1, "num_experts": [3, 2], "source": "test", "subject_names": ["code", "poems"]}


def write(path, header=HEADER, drop=(), **changes):
    """A file like that of `small_trace`, with some arrays changed, added or dropped."""
    arrays = {
        "header": np.frombuffer(header if isinstance(header, bytes) else json.dumps(header).encode(), np.uint8),
        "experts": np.array([[[0, 2], [1, 255]], [[2, 1], [0, 1]]], np.uint8),
        "guesses": np.array([[[0], [255]], [[2], [0]]], np.uint8),
        "replies": np.array([4, 5], np.int32),
        "subjects": np.array([0, 1], np.int16),
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if name not in drop})


def test_the_file_that_the_table_below_changes_is_sound(tmp_path):
    write(tmp_path / "routing.npz")
    assert_same(load_trace(tmp_path / "routing.npz"), small_trace())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["replies"]}, "must hold .*replies.npy.*found .'experts.npy', 'guesses.npy', 'header.npy', 'subj"),
        ({"more": np.zeros(1)}, "found .*more.npy"),
        ({"header": b"{"}, "header is not valid JSON"),
        ({"header": b"[" * 100_000}, "header is not valid JSON"),
        ({"header": [1]}, "version None, this MoEpic reads 1"),
        ({"header": HEADER | {"version": 2}}, "version 2, this MoEpic reads 1"),
        ({"header": HEADER | {"num_experts": []}}, "num_experts of 1 to 32767"),
        ({"header": HEADER | {"num_experts": [3, True]}}, "num_experts of 1 to 32767"),
        ({"header": HEADER | {"num_experts": [3, 2**15]}}, "num_experts of 1 to 32767"),
        ({"header": HEADER | {"num_experts": [3, 2, 2]}}, "experts must be for 2 tokens and 3 layers.*\\(2, 2, 2\\)"),
        ({"header": HEADER | {"num_experts": [3, 256]}}, r"experts must be an array of <i2, found '\|u1'"),
        ({"header": HEADER | {"num_experts": [2, 2]}}, "experts hold ids that are no experts"),
        ({"header": HEADER | {"source": None}}, "a source and a list of subject_names"),
        ({"header": HEADER | {"subject_names": ["code"]}}, "subjects must be 0 to 0, found 0 to 1"),
        ({"experts": np.array([["a"]], object)}, r"experts must be an array of \|u1, found"),
        ({"experts": np.zeros((2, 2, 2), ">i4")}, r"experts must be an array of \|u1, found '>i4'"),
        ({"experts": np.zeros((2, 2, 2), np.uint8)}, "experts name an expert twice for one token"),
        ({"experts": np.zeros((1, 2, 2), np.uint8)}, r"experts must be for 2 tokens .*\(1, 2, 2\)"),
        ({"guesses": np.zeros((2, 2), np.uint8)}, r"guesses must be for 2 tokens .*\(2, 2\)"),
        ({"guesses": np.asfortranarray(np.zeros((2, 2, 2), np.uint8))}, r"guesses must be an array of \|u1"),
        ({"guesses": np.full((2, 2, 1), 7, np.uint8)}, "guesses hold ids that are no experts"),
        ({"replies": np.array([5, 4], np.int32)}, "replies are not in order"),
        ({"replies": np.array(5, np.int32)}, "replies must be an array of <i4"),
        ({"subjects": np.array([0, -1], np.int16)}, "subjects must be 0 to 1, found -1 to 0"),
        ({"subjects": np.zeros((2, 1), np.int16)}, r"subjects must be for 2 tokens .*\(2, 1\)"),
    ],
)  # fmt: skip
def test_a_malformed_trace_is_refused(changes, message, tmp_path):
    write(tmp_path / "routing.npz", **changes)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load_trace(tmp_path / "routing.npz")
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(Trap()), b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "routing.npz"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match="no sound routing trace"):
        load_trace(path)


def test_a_pickled_array_is_not_opened(tmp_path):
    write(tmp_path / "routing.npz", experts=np.array([[[Trap()]]], object))
    with pytest.raises(BadCheckpoint, match="experts must be an array"):
        load_trace(tmp_path / "routing.npz")


@pytest.mark.parametrize(("shape", "message"), [("(2, 2, 3)", "needs 12 bytes, found 8"), ("(2, 2, 1)", "found 5"),
                                                ("(999999999, 2, 2)", "allowed are 1.07 GB")])  # fmt: skip
def test_an_array_that_is_not_as_long_as_it_says(shape, message, tmp_path):
    """Nothing is allocated for what a header promises."""
    path = tmp_path / "routing.npz"
    write(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["experts.npy"] = members["experts.npy"].replace(
        b"(2, 2, 2), }" + b" " * (len(shape) - 9), shape.encode() + b", }"
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(BadCheckpoint, match=message):
        load_trace(path)


@FUZZ
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damage_is_refused_or_harmless(position, value, cut, tmp_path):
    """One byte changed, or the end cut off: an expected error, or the same trace."""
    path = tmp_path / "routing.npz"
    save_trace(small_trace(), path)
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    content[place] = value
    path.write_bytes(content[: place if cut else None])
    try:
        found = load_trace(path)
    except MoepicError:
        return
    assert_same(found, small_trace())


def test_a_missing_file(tmp_path):
    with pytest.raises(BadCheckpoint, match="cannot be read: No such file or directory"):
        load_trace(tmp_path / "none.npz")


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSettings, match="cannot be written: Not a directory; choose another place"):
        save_trace(small_trace(), tmp_path / "file" / "routing.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(BadSettings, match="cannot be written"):
        save_trace(small_trace(), tmp_path / "folder.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz"]
