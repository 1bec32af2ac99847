"""Fused expert weights ↔ expert records, and segments of records as views.

A record is one expert packed neuron by neuron, `[neurons, matrices, hidden]`: row *i* holds neuron *i*'s gate row, up row
and down column side by side. So any prefix of neurons (the top segment) and the rest (the bottom) are each ONE byte range,
for every split ratio, and `y = y_top + y_bottom` exactly: the activation acts neuron by neuron (our reading of the
"vertical" split of arXiv 2509.08342). Called while loading (pack) and by the residency (views); allocates nothing large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import MoeLayer

ALIGNMENT = 4096  # bytes; direct disk reads need file offset, length and address in these units


@dataclass(frozen=True)
class FusedLayout:
    """How Transformers lays out a layer's fused expert tensors (flags of its experts interface)."""

    has_gate: bool = True  # gate_up_proj and down_proj; without: up_proj and down_proj
    is_transposed: bool = False  # weights are [E, in, out] instead of [E, out, in]
    is_concatenated: bool = True  # gate rows first, then up rows; otherwise gate and up alternate

    @property
    def input_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def shapes(self, layer: MoeLayer) -> dict[str, tuple[int, int, int]]:
        """Expected shapes of the two fused tensors by parameter name."""
        rows = layer.neurons * (2 if self.has_gate else 1)
        into, out = (layer.num_experts, rows, layer.hidden), (layer.num_experts, layer.hidden, layer.neurons)
        if self.is_transposed:
            into, out = (into[0], into[2], into[1]), (out[0], out[2], out[1])
        return {self.input_name: into, "down_proj": out}


def pack_expert(record: Tensor, first: Tensor, down: Tensor, layout: FusedLayout) -> None:
    """Writes one expert into `record` `[neurons, matrices, hidden]`, converting to its dtype.

    `first` is this expert's slice of gate_up_proj or up_proj, `down` that of down_proj, both laid out as `layout` says.
    """
    if layout.is_transposed:
        first = first.t()  # [rows, hidden]
    else:
        down = down.t()  # [neurons, hidden]
    neurons = record.shape[0]
    if layout.has_gate:
        if layout.is_concatenated:
            gate, up = first[:neurons], first[neurons:]
        else:
            gate, up = first[0::2], first[1::2]
        record[:, 0].copy_(gate)
        record[:, 1].copy_(up)
        record[:, 2].copy_(down)
    else:
        record[:, 0].copy_(first)
        record[:, 1].copy_(down)


def align(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment unit."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned_bytes(nbytes: int) -> Tensor:
    """An uninitialised host byte buffer `[nbytes]` whose address is a multiple of the alignment unit."""
    raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + nbytes]


def record_stride(layer: MoeLayer) -> int:
    """Bytes from one record to the next, in the host store and in staging buffers."""
    return align(layer.expert_bytes)


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
    assert 0 <= start_row < stop_row <= layer.neurons, (start_row, stop_row, layer.neurons)
    start = start_row * layer.row_bytes // ALIGNMENT * ALIGNMENT
    return Segment(start_row, stop_row, start, align(stop_row * layer.row_bytes))


def top_rows(layer: MoeLayer, split_ratio: float) -> int:
    """Neurons in the top segment. A ratio strictly between 0 and 1 leaves at least one neuron on each side."""
    if split_ratio <= 0 or split_ratio >= 1:
        return layer.neurons if split_ratio >= 1 else 0
    return min(max(1, round(split_ratio * layer.neurons)), layer.neurons - 1)


def rows_of(buffer: Tensor, layer: MoeLayer, dtype: torch.dtype, start_row: int, stop_row: int) -> Tensor:
    """View of neurons `start_row..stop_row` in a record-shaped byte buffer: `[rows, matrices, hidden]`."""
    start, stop = start_row * layer.row_bytes, stop_row * layer.row_bytes
    return buffer[start:stop].view(dtype).view(stop_row - start_row, layer.matrices, layer.hidden)
