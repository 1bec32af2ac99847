"""Linear layers outside the experts, quicker for one token of half precision on a CPU: sums of rows (`row_sums`).

`model` calls `quicken` once, when all weights are there. The layers stay Transformers' own in shape, names and answers,
save for rounding; only the order of their weights in memory and the product of a single token are other ones.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from ..row_sums import pays_for, sum_rows

_LARGEST_BYTES = 32 << 20  # a copy is held for a moment, and the head, the usual larger one, gains nothing


class RowLinear(nn.Linear):
    """A linear layer whose weight lies transposed: `[in_features, out_features]` in memory."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if input.numel() != self.in_features:
            return super().forward(input)
        total = sum_rows(input.reshape(-1), self.weight.t().unsqueeze(1)).sum(0, dtype=torch.float32)
        if self.bias is not None:
            total += self.bias
        return total.to(input.dtype).view(*input.shape[:-1], self.out_features)


def quicken(model: nn.Module) -> None:
    """Turns the linear layers that gain by it into `RowLinear`. Weights that several modules share stay as they are."""
    modules = list(model.modules())
    owners = Counter(id(parameter) for module in modules for parameter in module.parameters(recurse=False))
    for module in modules:
        if type(module) is nn.Linear and owners[id(module.weight)] == 1 and _gains(module.weight):
            weight = module.weight.data
            rows = weight.view(weight.shape[1], weight.shape[0])  # the same memory
            rows.copy_(weight.t().contiguous())
            module.weight.data = rows.t()
            module.__class__ = RowLinear


def _gains(weight: Tensor) -> bool:
    fits = min(weight.shape) > 1 and weight.is_contiguous() and weight.nbytes <= _LARGEST_BYTES
    return fits and pays_for(weight[:1])
