"""What this machine has: the `MachineProfile` that budgets are checked against.

Reads free and total memory of every tier when asked; unknown values are None, never zero. Measures nothing by itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from .errors import BadSettings
from .spec import MachineProfile


def probe(device: str = "auto") -> MachineProfile:
    """The machine as it is now. `auto` takes CUDA where there is a device. Raises BadSettings for an absent one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadSettings("device 'cuda' is not available on this machine; use device 'cpu' or 'auto'")
    memory, left = psutil.virtual_memory(), _cgroup_left()
    free = memory.available if left is None else min(memory.available, left)
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if device == "cpu" or not torch.cuda.is_available():
        return MachineProfile("cpu", "CPU", memory.total, free, memory.total, free, cores)
    device_free, device_total = torch.cuda.mem_get_info()
    return MachineProfile("cuda", torch.cuda.get_device_name(), device_total, device_free, memory.total, free, cores)


def _cgroup_left(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that memory cgroups (containers have one) leave this process; None when none limits it."""
    if not own.is_file():
        return None
    left = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # cgroups of version 2, of version 1
            top = mount / controllers
            left += [_left_in(folder) for folder in (top, top / path.lstrip("/"))]
    return min((nbytes for nbytes in left if nbytes is not None), default=None)


def _left_in(folder: Path) -> int | None:
    names = ("memory.max", "memory.current", "inactive_file")
    if not (folder / names[0]).is_file():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        limit, used = ((folder / name).read_text().strip() for name in names[:2])
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # the mount does not show this cgroup
    # Files that were read count as used, but yield when memory is asked for.
    return None if limit == "max" else max(0, int(limit) - int(used) + int(stat[names[2]]))
