"""Link names: presets, given bandwidths, and clear words for what does not exist or does not fit the device."""

from __future__ import annotations

import pytest

from moepic_core.errors import BadSettings
from moepic_core.links import PRESETS_BYTES_PER_S, Link, parse_link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("auto", Link("disk", None, "disk")),
        (" Disk ", Link("disk", None, "disk")),
        ("pcie4x16", Link("emulated", 25e9, "emulated link pcie4x16 (25 GB/s)")),
        ("PCIe3x16", Link("emulated", 13e9, "emulated link pcie3x16 (13 GB/s)")),
        ("emulated:16GB/s", Link("emulated", 16e9, "emulated link 16 GB/s")),
        ("emulated:1.5GiB", Link("emulated", 1.5 * 2**30, "emulated link 1.61 GB/s")),
    ],
)
def test_links_of_the_cpu(text: str, link: Link) -> None:
    assert parse_link(text, "cpu") == link


@pytest.mark.parametrize("preset", PRESETS_BYTES_PER_S)
def test_every_emulated_link_says_so(preset: str) -> None:
    link = parse_link(preset, "cpu")
    assert link.label.startswith("emulated link")
    assert link.bytes_per_s == PRESETS_BYTES_PER_S[preset]


def test_a_gpu_has_its_own_bus() -> None:
    assert parse_link("auto", "cuda") == Link("bus", None, "the GPU's own bus")
    with pytest.raises(BadSettings, match="a GPU uses its own bus, so leave link at 'auto'"):
        parse_link("disk", "cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pcie4x61", r"link 'pcie4x61' is unknown, did you mean 'pcie4x16'\? Allowed: auto, disk, emulated:16GB/s"),
        ("carrier pigeon", "link 'carrier pigeon' is unknown.* Allowed: auto, disk"),
        ("", "link '' is unknown"),
        ("emulated:", "link 'emulated:' names no bandwidth; write a number, a unit and /s, such as emulated:16GB/s"),
        ("emulated:fast", "link 'emulated:fast' names no bandwidth; .* such as emulated:16GB/s"),
        ("emulated:16 parsecs/s", "link 'emulated:16 parsecs/s' names no bandwidth"),
        ("emulated:999999999TB/s", "link 'emulated:999999999TB/s' names no bandwidth"),
        ("emulated:0GB/s", "link 'emulated:0GB/s' would never deliver anything"),
    ],
)
def test_other_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadSettings, match=message):
        parse_link(text, "cpu")
