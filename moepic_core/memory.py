"""What is kept of a checkpoint from one start to the next: measured costs, and the routing of its last tokens.

The engine reads both when it loads and writes them when it learns something. Without a folder nothing is kept. What is
missing, stale or damaged counts as never kept: it is measured again and overwritten. What cannot be written, on a disk
that is full or not ours, is not kept, because nothing of it is needed now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from .costs import Costs, LayerCosts, LinkSpeed
from .errors import BadSettings, MoepicError
from .routing import RoutingTrace
from .trace_file import load_trace, save_trace

_VERSION = 6  # of what costs mean
_STALE_S = 30 * 24 * 3600.0  # drivers, clocks and other programs change


class Memory:
    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def keep_costs(self, key: Sequence[object], costs: Costs) -> None:
        """`key` names all that the costs depend on: checkpoint, machine, link, number format, threads."""
        if self.folder is None:
            return
        text = json.dumps({"version": _VERSION, "time": time.time(), "costs": dataclasses.asdict(costs)})
        path = self._path("costs", key, "json")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def costs(self, key: Sequence[object]) -> Costs | None:
        if self.folder is None:
            return None
        try:
            found = json.loads(self._path("costs", key, "json").read_text())
            if found["version"] != _VERSION or time.time() - found["time"] > _STALE_S:
                return None
            values = found["costs"]
            layers = tuple(LayerCosts(**layer) for layer in values.pop("layers"))
            accuracy = tuple(map(tuple, values.pop("guess_accuracy")))
            alone = values.pop("alone")
            speed = None if alone is None else LinkSpeed(**alone)
            return Costs(layers=layers, guess_accuracy=accuracy, alone=speed, **values)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_trace(self, fingerprint: str, trace: RoutingTrace) -> None:
        if self.folder is None:
            return
        path = self._path("routing", [fingerprint], "npz")
        with contextlib.suppress(OSError, BadSettings):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_trace(trace, path)

    def trace(self, fingerprint: str) -> RoutingTrace | None:
        if self.folder is None:
            return None
        path = self._path("routing", [fingerprint], "npz")
        try:
            return load_trace(path) if path.is_file() else None
        except MoepicError:
            return None

    def _path(self, kind: str, key: Sequence[object], ending: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:16]}.{ending}"
