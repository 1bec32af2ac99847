"""What this machine has: the `MachineProfile` that budgets are checked against.

Reads free and total memory of every tier when asked; unknown values are None, never zero. Measures nothing by itself.
"""

from __future__ import annotations

import os

import psutil
import torch

from .errors import BadSettings
from .spec import MachineProfile

HEADROOM = 0.9  # part of the free memory that `auto` takes: a device filled to the brim slows down or fails


def probe(device: str = "auto") -> MachineProfile:
    """The machine as it is now. `auto` takes CUDA when there is a device. Raises BadSettings for a device not present."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadSettings("device 'cuda' is not available on this machine; use device 'cpu' or 'auto'")
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if device == "cpu" or not torch.cuda.is_available():
        free = min(memory.available, _cgroup_free() or memory.available)
        return MachineProfile("cpu", "CPU", memory.total, free, memory.total, free, cores)
    free, total = torch.cuda.mem_get_info()
    return MachineProfile("cuda", torch.cuda.get_device_name(), total, free, memory.total, memory.available, cores)


def _cgroup_free() -> int | None:
    """Bytes left in this process's memory cgroup, when one limits it (containers do)."""
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_path) as limit, open(used_path) as used:
                text = limit.read().strip()
                return None if text == "max" else max(0, int(text) - int(used.read()))
        except OSError:
            continue
    return None
