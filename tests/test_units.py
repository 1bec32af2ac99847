"""Sizes that people write and read, and the nearest-word errors for those that they mistype."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepic_core.errors import BadSettings
from moepic_core.units import ALIGNMENT_BYTES, align, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GB", 2_000_000_000), ("2 gb", 2_000_000_000), ("2GiB", 2**31), (" 512 MiB ", 2**29), ("1.5gib", 3 * 2**29),
        ("800MB", 800_000_000), ("8.2MB", 8_200_000), (".5kb", 500), ("1TB", 10**12), ("1tib", 2**40),
        ("7b", 7), ("12345", 12345), ("0", 0), (0, 0), (123, 123), (1e9, 10**9), (12.7, 12),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | float, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["12 parsecs", "", "GB", "-1GB", "1e9", "two GB", "1,5GB", "2GB/s", "1.GB", "٣GB", "nan", "inf", True]
)
def test_nonsense_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadSettings, match=r"is not understood; write a number and a unit such as 2GB"):
        parse_bytes(text)


@pytest.mark.parametrize("number", [-1, -0.5, float("inf"), float("nan"), 2**63, 1e300])
def test_numbers_that_are_no_size_are_refused(number: float) -> None:
    with pytest.raises(BadSettings, match="a size cannot be"):
        parse_bytes(number)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "10000000TiB"])
def test_sizes_beyond_any_machine_are_refused(text: str) -> None:
    with pytest.raises(BadSettings, match="the largest is 8 EiB") as refused:
        parse_bytes(text)
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (12_345, "12.3 kB"), (123_456, "123 kB"),
        (1_580_000_000, "1.58 GB"), (24e9, "24 GB"), (1.5e12, "1.5 TB"), (-2_500_000, "-2.5 MB"),
    ],
)  # fmt: skip
def test_sizes_are_written(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 10**15))
def test_what_is_written_can_be_read_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006)


@given(st.integers(0, 2**40))
def test_aligned_sizes_are_the_next_multiple(nbytes: int) -> None:
    assert align(nbytes) % ALIGNMENT_BYTES == 0
    assert 0 <= align(nbytes) - nbytes < ALIGNMENT_BYTES
