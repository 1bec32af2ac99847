"""The host tier in RAM: expert records that are packed by threads while the next tensor is read.

`assembly` makes it for a GPU, whose bus reads it, and for an emulated link. Page-locked memory is what a GPU reads at
full speed; where the system refuses it the store says so and goes on.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Segment, record_stride
from .packing import NUM_FUSED, FusedLayout, aligned_bytes, pack_expert, rows_of
from .spec import ModelSpec
from .transfer.base import MemorySource, Source
from .transfer.pinning import Pinned, pin
from .units import format_bytes

_NUM_PACKERS = 2  # one thread touches fresh memory more slowly than a disk brings it (docs/LOG.md)


class _Job(NamedTuple):
    """A fused tensor that is being packed into its layer's records `[experts * stride]`."""

    layer: int
    name: str
    fused: Tensor
    layout: FusedLayout
    records: Tensor


class RamStore:
    """Records in host memory; page-locked when `pinned`, so that a GPU reads them at full speed.

    When pinning fails the memory stays pageable and `notice` says so. A tensor is packed by threads while the caller
    reads the next one: one at a time, so that no more than these two are in memory. What packing raises comes out of
    the next `add`, or of `seal`.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, pinned: bool) -> None:
        self.layers = spec.moe_layers
        self.dtype = dtype
        self.complete = False
        self.notice: str | None = None
        self._want_pinned = pinned
        self._pins: list[Pinned] = []
        self._records: list[Tensor | None] = [None] * len(self.layers)
        self._packed: list[set[str]] = [set() for _ in self.layers]  # names of a layer's tensors
        self._packers = ThreadPoolExecutor(_NUM_PACKERS, thread_name_prefix="moepic-pack")
        self._job: _Job | None = None
        self._packing: list[Future[None]] = []

    def add(self, layer: int, name: str, fused: Tensor, layout: FusedLayout) -> None:
        self._finish()
        geometry, records = self.layers[layer], self._records[layer]
        if records is None:
            self._records[layer] = records = aligned_bytes(geometry.num_experts * record_stride(geometry))
        self._job = _Job(layer, name, fused, layout, records)
        self._packing = [self._packers.submit(self._pack, first) for first in range(_NUM_PACKERS)]

    def seal(self) -> None:
        self._finish()
        self._packers.shutdown()
        missing = [layer for layer, names in enumerate(self._packed) if len(names) < NUM_FUSED]
        assert not missing, f"layers {missing} were never packed"
        self.complete = True

    def source(self, layer: int, expert: int, segment: Segment) -> Source:
        records = self._records[layer]
        assert records is not None, layer
        base = expert * record_stride(self.layers[layer])
        return MemorySource(records[base + segment.start : base + segment.stop])

    def close(self) -> None:
        self._packers.shutdown()
        for pinned in self._pins:
            pinned.release()
        self._pins.clear()
        self._records = [None] * len(self.layers)

    def _finish(self) -> None:
        """Waits for what is being packed, and lets go of it."""
        for packing in self._packing:
            packing.result()
        job, self._job, self._packing = self._job, None, []
        if job is None:
            return
        self._packed[job.layer].add(job.name)
        if self._want_pinned and len(self._packed[job.layer]) == NUM_FUSED:
            self._pin(job.records)

    def _pack(self, first: int) -> None:
        """Every second expert from `first` on. The job is no argument, since an executor lets go of those late."""
        job = self._job
        assert job is not None
        geometry = self.layers[job.layer]
        stride = record_stride(geometry)
        for expert in range(first, geometry.num_experts, _NUM_PACKERS):
            record = rows_of(job.records[expert * stride :], geometry, self.dtype, 0, geometry.neurons)
            pack_expert(record, job.name, job.fused[expert], job.layout)

    def _pin(self, records: Tensor) -> None:
        pinned = pin(records)
        if pinned.error is None:
            self._pins.append(pinned)
            return
        self._want_pinned = False
        held = sum(pin.nbytes for pin in self._pins)
        self.notice = (
            f"only {format_bytes(held)} of expert memory could be page-locked ({pinned.error}); the rest is pageable "
            f"and travels slower; raise the locked-memory limit (ulimit -l) or free host memory"
        )
