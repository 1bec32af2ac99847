"""The link that experts travel over, by name. Presets of emulated links are what such slots carry in practice.

An emulated link moves real bytes in host memory and completes when a link of the given bandwidth would have. Whoever
shows a number measured over one says "emulated link" beside it; `Link.label` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import BadSettings, nearest
from .spec import DeviceKind
from .units import format_bytes, parse_bytes

# Payload per second of a large pinned copy, about 80 % of the nominal rate.
PRESETS_BYTES_PER_S = {
    "pcie3x4": 3.2e9, "pcie3x8": 6.5e9, "pcie3x16": 13e9,
    "pcie4x4": 6.5e9, "pcie4x8": 13e9, "pcie4x16": 25e9,
    "pcie5x8": 25e9, "pcie5x16": 50e9,
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    kind: Literal["bus", "disk", "emulated"]
    bytes_per_s: float | None  # set for emulated links only
    label: str  # for people


def parse_link(text: str, device: DeviceKind) -> Link:
    """The link named `text` for a device. Raises BadSettings for names that are unknown or do not fit the device."""
    name = text.strip().lower()
    if device == "cuda":
        if name != "auto":
            raise BadSettings(f"link '{text}' is for device cpu; a GPU uses its own bus, so leave link at 'auto'")
        return Link("bus", None, "the GPU's own bus")
    if name in ("auto", "disk"):
        return Link("disk", None, "disk")
    if name in PRESETS_BYTES_PER_S:
        rate = PRESETS_BYTES_PER_S[name]
        return Link("emulated", rate, f"emulated link {name} ({format_bytes(rate)}/s)")
    if name.startswith("emulated:"):
        rate = _bandwidth(name.removeprefix("emulated:"), text)
        return Link("emulated", rate, f"emulated link {format_bytes(rate)}/s")
    allowed = ["auto", "disk", "emulated:16GB/s", *PRESETS_BYTES_PER_S]
    raise BadSettings(f"link '{text}' is unknown{nearest(name, allowed)} Allowed: {', '.join(allowed)}")


def _bandwidth(text: str, whole: str) -> float:
    try:
        rate = float(parse_bytes(text.removesuffix("/s")))
    except BadSettings as error:
        raise BadSettings(
            f"link '{whole}' names no bandwidth; write a number, a unit and /s, such as emulated:16GB/s"
        ) from error
    if rate <= 0:
        raise BadSettings(f"link '{whole}' would never deliver anything; give a bandwidth such as emulated:16GB/s")
    return rate
