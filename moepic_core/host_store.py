"""The host tier: what a complete, immutable copy of all expert records promises, wherever it lies.

Filled once while the model loads, one fused tensor at a time, then only read. Because it never changes and misses
nothing, evicting from the device is forgetting. `source()` describes a segment for a transfer; nothing here copies
toward the device. `ram_store` and `disk_store` are the two kinds.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .geometry import Segment
from .packing import FusedLayout
from .transfer.base import Source


class HostStore(Protocol):
    complete: bool  # True: `add` is not needed (a packed file from an earlier start)
    notice: str | None  # something that the user should know, such as memory that could not be pinned

    def add(self, layer: int, name: str, fused: Tensor, layout: FusedLayout) -> None:
        """Takes the fused tensor `name` of a layer (shape: `FusedLayout.shapes`), which nobody may change any more."""

    def seal(self) -> None:
        """Called once after the last tensor: from here on the store is complete and immutable."""

    def source(self, layer: int, expert: int, segment: Segment) -> Source: ...

    def close(self) -> None: ...
