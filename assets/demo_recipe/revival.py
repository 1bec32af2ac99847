"""Experts that training left without work get a share of their layer's busiest ones'.

A router that never chooses an expert never learns to: neither the language loss nor the balance loss reaches it. So,
once, before the polish, each idle expert becomes a copy of a busy one, and the two routers' rows are pulled apart, so
that tokens which chose the one now choose between both (ours).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

IDLE = 0.05  # of an even share of the layer's uses; less is idle
APART = 0.5  # of the length of the row: how far the two rows lie apart


@torch.no_grad()
def revive(model: nn.Module, optimizer: torch.optim.Optimizer, uses: Tensor) -> int:
    """Shares the work of busy experts with idle ones; returns the number of these.

    `uses` [layers, experts] are counts, the same in all processes, as must be the seed of torch.
    """
    revived = 0
    for layer, counts in zip(model.model.layers, uses.clone(), strict=True):  # type: ignore[union-attr]
        even = counts.sum().item() / len(counts)
        for idle in (counts < IDLE * even).nonzero().flatten().tolist():
            busy = int(counts.argmax())
            for parameter in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                moments = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
                for tensor in (parameter, *moments):
                    tensor[idle] = tensor[busy]
            rows = layer.mlp.gate.weight
            push = torch.randn_like(rows[busy])
            push *= APART / 2 * rows[busy].norm() / push.norm()
            rows[busy] += push
            rows[idle] -= push
            counts[busy] = counts[idle] = counts[busy] // 2
            revived += 1
    return revived


@torch.no_grad()
def uses_of(routers: tuple[Tensor, ...], top_k: int) -> Tensor:
    """How often a batch chose each expert, over all processes: `[layers, experts]` from logits `[tokens, experts]`."""
    counts = torch.stack([
        torch.bincount(logits.topk(top_k).indices.flatten(), minlength=logits.shape[1]) for logits in routers
    ])  # fmt: skip
    dist.all_reduce(counts)
    return counts
