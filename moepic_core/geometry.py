"""Where bytes of an expert record lie: strides, top segments, aligned byte ranges. Pure numbers, no torch.

A record is one expert packed neuron by neuron (`packing`). Planner, host store, device cache and residency all count
with these functions, so what is planned is exactly what is allocated and what travels.
"""

from __future__ import annotations

from dataclasses import dataclass

from .spec import MoeLayer
from .units import ALIGNMENT_BYTES, align


@dataclass(frozen=True)
class Segment:
    """A range of neurons of a record, and the aligned byte range that carries it.

    The byte range is widened to alignment units on both sides. That is harmless: a buffer has the record's own offsets,
    so the extra bytes are the record's own and land where they belong.
    """

    start_row: int
    stop_row: int
    start: int  # byte offset in the record and in the buffer
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def segment(layer: MoeLayer, start_row: int, stop_row: int) -> Segment:
    """Neurons `start_row..stop_row`, at least one."""
    assert 0 <= start_row < stop_row <= layer.neurons, (start_row, stop_row, layer.neurons)
    start = start_row * layer.row_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return Segment(start_row, stop_row, start, align(stop_row * layer.row_bytes))


def record_stride(layer: MoeLayer) -> int:
    """Bytes from one record to the next, in the host store and in staging buffers."""
    return align(layer.expert_bytes)


def top_rows(layer: MoeLayer, split_ratio: float) -> int:
    """Neurons in the top segment. A ratio strictly between 0 and 1 leaves at least one neuron on each side."""
    if split_ratio <= 0 or split_ratio >= 1:
        return layer.neurons if split_ratio >= 1 else 0
    return min(max(1, round(split_ratio * layer.neurons)), layer.neurons - 1)


def top_bytes(layer: MoeLayer, rows: int) -> int:
    """Bytes of a slot that holds the first `rows` neurons; 0 for none."""
    return segment(layer, 0, rows).nbytes if rows else 0
