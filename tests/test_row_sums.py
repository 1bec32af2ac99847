"""Sums of rows are products, for every number of rows and matrices, and use every row of the right matrix once."""

from __future__ import annotations

import pytest
import torch

from moepic_core.row_sums import pays_for, sum_rows

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("matrices", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 384])
def test_parts_add_up_to_the_product(rows: int, matrices: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    scales = torch.randn(rows, generator=generator).to(dtype)
    weights = torch.randn(rows, matrices, 48, generator=generator).to(dtype)
    expected = scales.double() @ weights[:, -1].double()
    found = sum_rows(scales, weights).double().sum(0)
    error = (found - expected).abs().max() / rows**0.5
    assert error < 2 * torch.finfo(dtype).eps, f"largest difference {error:.1e} of a term's size"


@pytest.mark.parametrize("rows", [1, 7, 16, 100])
def test_small_whole_numbers_are_added_exactly(rows: int) -> None:
    weights = torch.full((rows, 3, 8), float("nan"), dtype=torch.bfloat16)  # of the other matrices nothing is read
    weights[:, 2] = torch.arange(8)
    assert sum_rows(torch.ones(rows, dtype=torch.bfloat16), weights).sum(0).tolist() == [rows * i for i in range(8)]


def test_only_one_row_of_half_precision_pays() -> None:
    assert not pays_for(torch.ones(1, 4))
    assert not pays_for(torch.ones(2, 4, dtype=torch.bfloat16))
    assert not pays_for(torch.ones(1, 4, dtype=torch.bfloat16, device="meta"))
    assert pays_for(torch.ones(1, 4, dtype=torch.bfloat16)) == ("fbgemm" in torch.backends.quantized.supported_engines)
