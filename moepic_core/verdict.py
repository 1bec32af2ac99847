"""Whether a model runs on a machine, in three steps and one sentence. Pure; called before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .budgets import HEADROOM, Needs
from .links import parse_link
from .spec import MachineProfile, ModelSpec
from .units import format_bytes


@dataclass(frozen=True)
class Verdict:
    step: Literal["fits whole", "fits with offloading", "will not run"]
    text: str


def judge(spec: ModelSpec, needs: Needs, machine: MachineProfile, link: str) -> Verdict:
    """Compares what the model needs with what is free now. A machine without a GPU has one memory for both tiers."""
    device = format_bytes(machine.device_free_bytes)
    kind = parse_link(link, machine.device).kind
    on_host = 0 if kind == "disk" else spec.host_bytes
    shared = machine.device == "cpu"
    free_for_host = machine.host_free_bytes - (needs.smallest if shared else 0)
    free_for_all = int(machine.device_free_bytes * HEADROOM) - (on_host if shared else 0)
    if needs.smallest > machine.device_free_bytes:
        return Verdict(
            "will not run",
            f"will not run: even without any cached expert it needs {format_bytes(needs.smallest)}, {device} is free",
        )
    if on_host > free_for_host:
        return Verdict(
            "will not run",
            f"will not run over this link: its host copy needs {format_bytes(on_host)} of host memory, "
            f"{format_bytes(max(0, free_for_host))} is free; a CPU device with link 'disk' needs none",
        )
    if needs.everything <= free_for_all:
        return Verdict("fits whole", f"fits whole: {format_bytes(needs.everything)} of {device} free")
    return Verdict(
        "fits with offloading",
        f"fits with offloading: any budget from {format_bytes(needs.smallest)} works, {device} is free, "
        f"{format_bytes(needs.everything)} would hold everything",
    )
