"""Products of one row with half-precision weights on a CPU, as weighted sums of the weights' rows.

Called by `expert_math` for the last product of an expert. `torch.mm` reads such weights at half of the speed that the
memory has, because oneDNN rearranges them first; torch's embedding bags (FBGEMM) add rows up where they lie, ask for
rows ahead, and take them from any places: the rows of one matrix out of a record's three, for one (ours; docs/LOG.md).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_PARTS = 8  # sums that threads share; a fixed number, so that answers do not depend on how many threads there are


def pays_for(x: Tensor) -> bool:
    """Whether a product of x `[rows, …]` with weights of its kind is faster as a sum of rows."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.shape[0] == 1 and half and x.device.type == "cpu" and _has_fbgemm()


def sum_rows(scales: Tensor, weights: Tensor) -> Tensor:
    """scales `[rows]`, weights `[rows, matrices, width]`, contiguous → `[parts, width]`, whose sum is
    `scales @ weights[:, -1]`. Each part is added up in float32 and rounded once.
    """
    rows, matrices, width = weights.shape
    places, starts = _places(rows, matrices)
    return torch.embedding_bag(weights.view(-1, width), places, starts, False, 0, False, scales)[0]


@functools.cache
def _places(rows: int, matrices: int) -> tuple[Tensor, Tensor]:
    """Where the last matrix's rows are among all, and where each part begins among them. Parts may be empty."""
    places = torch.arange(matrices - 1, rows * matrices, matrices, dtype=torch.int32)
    return places, torch.arange(_PARTS, dtype=torch.int32) * rows // _PARTS


@functools.cache
def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
