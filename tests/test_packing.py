"""Records hold every neuron side by side whatever the fused layout, and segments are exact aligned byte ranges."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moepic_core.geometry import Segment, record_stride, segment, top_bytes, top_rows
from moepic_core.packing import FusedLayout, aligned_bytes, pack_expert, rows_of
from moepic_core.spec import MoeLayer
from moepic_core.units import ALIGNMENT_BYTES, align

LAYOUTS = [FusedLayout(*flags) for flags in itertools.product((True, False), repeat=3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS, NEURONS, HIDDEN = 3, 10, 8


def layer_of(layout: FusedLayout, dtype: torch.dtype, neurons: int = NEURONS, hidden: int = HIDDEN) -> MoeLayer:
    return MoeLayer(0, EXPERTS, neurons, hidden, 3 if layout.has_gate else 2, dtype.itemsize)


def fused_of(matrices: list[Tensor], layout: FusedLayout) -> dict[str, Tensor]:
    """Transformers' fused tensors of gate, up `[E, neurons, hidden]` and down `[E, hidden, neurons]`."""
    *into, down = matrices
    joined = torch.cat(into, dim=1) if layout.is_concatenated else torch.stack(into, dim=2).flatten(1, 2)
    if layout.is_transposed:
        joined, down = joined.transpose(1, 2), down.transpose(1, 2)
    return {layout.input_name: joined.contiguous(), "down_proj": down.contiguous()}


def random_matrices(layout: FusedLayout, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    into = [torch.randn(EXPERTS, NEURONS, HIDDEN, generator=generator) for _ in range(2 if layout.has_gate else 1)]
    return [matrix.to(dtype) for matrix in (*into, torch.randn(EXPERTS, HIDDEN, NEURONS, generator=generator))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_every_layout_and_dtype_packs_neuron_by_neuron(
    layout: FusedLayout, stored: torch.dtype, dtype: torch.dtype
) -> None:
    layer, matrices = layer_of(layout, dtype), random_matrices(layout, stored)
    fused = fused_of(matrices, layout)
    assert {name: tuple(tensor.shape) for name, tensor in fused.items()} == layout.shapes(layer)
    for expert in range(EXPERTS):
        buffer = aligned_bytes(layer.expert_bytes)
        record = rows_of(buffer, layer, dtype, 0, NEURONS)
        for name, tensor in fused.items():
            pack_expert(record, name, tensor[expert], layout)
        *into, down = (matrix[expert].to(dtype) for matrix in matrices)
        for neuron in range(NEURONS):
            row = torch.stack([*(matrix[neuron] for matrix in into), down[:, neuron]])  # [matrices, hidden]
            assert torch.equal(rows_of(buffer, layer, dtype, neuron, neuron + 1)[0], row), (expert, neuron)


@pytest.mark.parametrize("rows", range(1, NEURONS))
def test_a_top_and_its_bottom_are_one_byte_range_each(rows: int) -> None:
    layer = layer_of(FusedLayout(), torch.float32)
    buffer = torch.arange(layer.expert_bytes, dtype=torch.int64).to(torch.uint8)
    top, bottom = rows_of(buffer, layer, torch.float32, 0, rows), rows_of(buffer, layer, torch.float32, rows, NEURONS)
    cut = rows * layer.row_bytes
    assert torch.equal(top.reshape(-1).view(torch.uint8), buffer[:cut])
    assert torch.equal(bottom.reshape(-1).view(torch.uint8), buffer[cut:])
    assert top.data_ptr() == buffer.data_ptr()  # views, no copies
    assert bottom.data_ptr() == buffer.data_ptr() + cut


layers = st.builds(
    MoeLayer,
    decoder_layer=st.just(0),
    num_experts=st.integers(1, 256),
    neurons=st.integers(1, 3000),
    hidden=st.integers(1, 300),
    matrices=st.sampled_from((2, 3)),
    itemsize=st.sampled_from((2, 4)),
)


@given(layers, st.data())
def test_segments_are_aligned_and_carry_their_rows(layer: MoeLayer, data: st.DataObject) -> None:
    start_row = data.draw(st.integers(0, layer.neurons - 1))
    stop_row = data.draw(st.integers(start_row + 1, layer.neurons))
    part = segment(layer, start_row, stop_row)
    assert part.start % ALIGNMENT_BYTES == part.stop % ALIGNMENT_BYTES == 0
    first, last = start_row * layer.row_bytes, stop_row * layer.row_bytes
    assert 0 <= part.start <= first < last <= part.stop <= record_stride(layer)  # all its rows, within its own record
    assert first - part.start < ALIGNMENT_BYTES > part.stop - last  # and no more than alignment asks for
    assert part.nbytes == part.stop - part.start


@given(layers, st.data())
def test_top_and_bottom_cover_the_record(layer: MoeLayer, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, layer.neurons))
    assert top_bytes(layer, rows) == align(rows * layer.row_bytes)
    if 0 < rows < layer.neurons:
        top, bottom = segment(layer, 0, rows), segment(layer, rows, layer.neurons)
        assert (top.start, top.stop) == (0, top_bytes(layer, rows))
        assert bottom.start <= top.stop
        assert bottom.stop == record_stride(layer)


def test_a_segment_in_numbers() -> None:
    layer = MoeLayer(0, 8, neurons=100, hidden=50, matrices=3, itemsize=2)  # 300 bytes a row
    assert segment(layer, 0, 40) == Segment(0, 40, 0, 12288)
    assert segment(layer, 40, 100) == Segment(40, 100, 8192, 32768)
    assert record_stride(layer) == 32768


@pytest.mark.parametrize(("start_row", "stop_row"), [(0, 0), (5, 5), (6, 5), (-1, 5), (0, 11)])
def test_an_empty_or_foreign_segment_is_a_mistake_of_ours(start_row: int, stop_row: int) -> None:
    with pytest.raises(AssertionError, match=str(stop_row)):
        segment(layer_of(FusedLayout(), torch.float32), start_row, stop_row)


@pytest.mark.parametrize(
    ("split", "neurons", "rows"),
    [
        (0.0, 10, 0), (1.0, 10, 10), (0.4, 10, 4), (0.5, 10, 5),
        (0.001, 10, 1), (0.999, 10, 9), (0.44, 10, 4), (0.46, 10, 5),  # a side is never empty by rounding
        (0.5, 1, 0), (0.5, 2, 1), (0.4, 14336, 5734),
    ],
)  # fmt: skip
def test_top_rows(split: float, neurons: int, rows: int) -> None:
    assert top_rows(layer_of(FusedLayout(), torch.float32, neurons), split) == rows


@given(st.integers(1, 5 * ALIGNMENT_BYTES))
def test_alignment(nbytes: int) -> None:
    assert align(nbytes) - nbytes in range(ALIGNMENT_BYTES)
    assert align(nbytes) % ALIGNMENT_BYTES == 0
    buffer = aligned_bytes(nbytes)
    assert buffer.numel() == nbytes
    assert buffer.data_ptr() % ALIGNMENT_BYTES == 0
