"""Fused expert weights ↔ expert records, and segments of records as views.

A record is one expert packed neuron by neuron, `[neurons, matrices, hidden]`: row *i* holds neuron *i*'s gate row, up
row and down column side by side. So any prefix of neurons (the top segment) and the rest (the bottom) are each ONE byte
range, for every split ratio, and `y = y_top + y_bottom` exactly: the activation acts neuron by neuron (our reading of
the "vertical" split of arXiv 2509.08342). The host store packs, device cache and residency view; `geometry` has the
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BadCheckpoint
from .spec import MoeLayer
from .units import ALIGNMENT_BYTES

NUM_FUSED = 2  # tensors of a layer: into the neurons, and down


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


def pack_expert(record: Tensor, name: str, weight: Tensor, layout: FusedLayout) -> None:
    """Writes what one fused tensor says of one expert into `record` `[neurons, matrices, hidden]`, in its dtype.

    `weight` is this expert's slice of the fused tensor `name`, laid out as `layout` says.
    """
    is_down = name == "down_proj"
    if is_down != layout.is_transposed:
        weight = weight.t()  # [rows, hidden]
    neurons = record.shape[0]
    if is_down:
        record[:, -1].copy_(weight)
    elif not layout.has_gate:
        record[:, 0].copy_(weight)
    elif layout.is_concatenated:
        record[:, 0].copy_(weight[:neurons])
        record[:, 1].copy_(weight[neurons:])
    else:
        record[:, 0].copy_(weight[0::2])
        record[:, 1].copy_(weight[1::2])


def check_layout(layer: MoeLayer, fused: Mapping[str, Tensor], layout: FusedLayout, name: str) -> None:
    """Raises BadCheckpoint when a fused tensor has not the shape that the geometry promises."""
    for key, shape in layout.shapes(layer).items():
        found = tuple(fused[key].shape) if key in fused else None
        if found != shape:
            raise BadCheckpoint(f"{name}.{key} should be {list(shape)} but is {found}; the checkpoint is damaged")


def aligned_bytes(nbytes: int) -> Tensor:
    """An uninitialised host byte buffer `[nbytes]` whose address is a multiple of the alignment unit."""
    raw = torch.empty(nbytes + ALIGNMENT_BYTES, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT_BYTES
    return raw[skip : skip + nbytes]


def rows_of(buffer: Tensor, layer: MoeLayer, dtype: torch.dtype, start_row: int, stop_row: int) -> Tensor:
    """View of neurons `start_row..stop_row` in a record-shaped byte buffer: `[rows, matrices, hidden]`."""
    start, stop = start_row * layer.row_bytes, stop_row * layer.row_bytes
    return buffer[start:stop].view(dtype).view(stop_row - start_row, layer.matrices, layer.hidden)
