"""Meters of the machine and the bar of the device's memory: sensors and snapshot in, JSON out. Pure.

`watch` calls it whenever a page asks. What experts cost on the link is the engine's own count; everything else is what
driver and operating system say, and where they say nothing the meter is not available.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moepic_core.metrics import Snapshot
from moepic_core.units import format_bytes

from .nouns import Loaded, Look
from .sensors import Sample
from .views import MEMORY, UNKNOWN, percent

NOT_AVAILABLE = "not available"
HOT_C = 100.0  # a full bar where the driver does not say when it would slow down
LABELS = {
    **MEMORY,
    "copy": "Host copy",
    "unaccounted": "Unaccounted",
    "others": "Other programs",
    "rest": "Other programs and unaccounted",
}
NEVER_TOUCHED = ("workspace", "kv", "cache", "staging", "copy", "resident")  # where reserved memory is unused first


def hardware(sample: Sample | None, look: Look, traffic_bytes_per_s: float) -> dict[str, Any]:
    """Meters and the bar of the device's memory."""
    read = sample or Sample()
    loaded = look.loaded
    link = loaded.link.bytes_per_s or loaded.machine.link_bytes_per_s if loaded else None
    return {
        "memory": memory(read, look),
        "meters": {
            "experts": _meter(traffic_bytes_per_s if loaded else None, link, _rate, unknown=UNKNOWN),
            **_meters(read),
        },
        "source": read.source if read.source != Sample.source else None,
        "gpu": read.gpu_name or (f"no GPU readings: {read.reason}" if read.reason else ""),
    }


def readings(sample: Sample) -> list[tuple[str, str]]:
    """What the sensors said, in words, with why there is nothing where they said nothing."""
    meters = _meters(sample)
    names = {"gpu": "GPU use", "pcie-in": "PCIe in", "pcie-out": "PCIe out", "power": "Power",
             "temperature": "Temperature", "vram": "VRAM used", "cpu": "CPU use", "ram": "RAM used",
             "disk": "Disk read"}  # fmt: skip
    return [("GPU", sample.gpu_name or f"none ({sample.reason})"),
            *((name, meters[key]["text"]) for key, name in names.items())]  # fmt: skip


def _meters(read: Sample) -> dict[str, Any]:
    return {
        "gpu": _meter(read.gpu_use, 1.0, percent),
        "pcie-in": _meter(read.pcie_in_bytes_per_s, read.pcie_limit_bytes_per_s, _rate),
        "pcie-out": _meter(read.pcie_out_bytes_per_s, read.pcie_limit_bytes_per_s, _rate),
        "power": _meter(read.power_w, read.power_limit_w, "{:.0f} W".format),
        "temperature": _meter(read.temperature_c, read.temperature_limit_c or HOT_C, "{:.0f} °C".format),
        "cpu": _meter(read.cpu_use, 1.0, percent),
        "ram": _meter(read.ram_used_bytes, read.ram_total_bytes, format_bytes),
        "vram": _meter(read.vram_used_bytes, read.vram_total_bytes, format_bytes),
        "disk": _meter(read.disk_read_bytes_per_s, read.disk_limit_bytes_per_s, _rate),
    }


def _meter(
    value: float | None, full: float | None, say: Callable[[float], str], unknown: str = NOT_AVAILABLE
) -> dict[str, Any]:
    if value is None:
        return {"text": unknown, "share": None}
    return {"text": say(value), "share": min(1.0, value / full) if full else None}


def memory(sample: Sample, look: Look) -> dict[str, Any] | None:
    """The device's memory by kind; the parts sum to what driver or operating system say is used."""
    loaded, snapshot = look.loaded, look.snapshot
    is_gpu = loaded.machine.device == "cuda" if loaded else sample.vram_used_bytes is not None
    used, total, own = (
        (sample.vram_used_bytes, sample.vram_total_bytes, sample.vram_own_bytes)
        if is_gpu
        else (sample.ram_used_bytes, sample.ram_total_bytes, sample.ram_own_bytes)
    )
    if used is None or not total:
        return None
    budget = snapshot.plan.memory.budget if snapshot and snapshot.plan else None
    parts = memory_parts(_held(snapshot, loaded), used, own)
    return {
        "name": "VRAM" if is_gpu else "RAM",
        "parts": [
            {"kind": kind, "label": LABELS[kind], "text": format_bytes(nbytes), "share": nbytes / total}
            for kind, nbytes in parts.items()
        ],
        "budget": None if budget is None else {"text": format_bytes(budget), "share": min(1.0, budget / total)},
        "text": f"{format_bytes(used)} of {format_bytes(total)}",
    }


def memory_parts(held: Mapping[str, int], used: int, own: int | None) -> dict[str, int]:
    """`used` bytes by kind: what our books say is `held`, and the rest. `own` is what this process has of them."""
    known = used if own is None else min(own, used)
    parts, excess = dict(held), sum(held.values()) - known
    for kind in NEVER_TOUCHED:
        cut = min(parts.get(kind, 0), max(0, excess))
        excess -= cut
        if cut:
            parts[kind] -= cut
    left = known - sum(parts.values())
    return {**parts, "rest": left} if own is None else {**parts, "unaccounted": left, "others": used - known}


def _held(snapshot: Snapshot | None, loaded: Loaded | None) -> dict[str, int]:
    if snapshot is None or loaded is None:
        return {}
    held = {kind: snapshot.memory_bytes.get(kind, 0) for kind in MEMORY}
    # Without a GPU, an emulated link's host copy lies in the same memory.
    return {**held, "copy": loaded.spec.host_bytes} if loaded.link.kind == "emulated" else held


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"
