"""Words for bytes, bandwidths and budgets, read from and written for people, and the unit that bytes are laid out in.

Used everywhere that a size is shown, typed or rounded. No state.
"""

from __future__ import annotations

import re

from .errors import BadSettings

_UNIT_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
ALIGNMENT_BYTES = 4096  # what O_DIRECT asks of offsets, lengths and addresses on every common disk
_LARGEST = 2**63  # bytes; more is a slip of the finger
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """Bytes in `text`: `"2GB"` (10⁹), `"2GiB"` (2³⁰), `"512 MiB"`, a plain number of bytes. Raises BadSettings."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        if not 0 <= text < _LARGEST:
            raise BadSettings(f"a size cannot be {text}; give a number of bytes such as 2000000000 or '2GB'")
        return int(text)
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in _UNIT_BYTES:
        raise BadSettings(f"size {text!r} is not understood; write a number and a unit such as 2GB, 1.5GiB or 800MB")
    size = float(match[1]) * _UNIT_BYTES[match[2].lower()]
    if size >= _LARGEST:
        raise BadSettings(f"size {str(text)[:40]!r} is more than any machine has; the largest is 8 EiB")
    return round(size)


def format_bytes(count: float) -> str:
    """`count` bytes for people, decimal units, three significant figures: `1.58 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def align(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment unit."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
