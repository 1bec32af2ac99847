"""What a loaded model needs and can do, found by running it for a moment without its experts. Called once at load."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .experts import register
from .model import HfModel

_FIRST, _MORE = 8, 2  # tokens; few follow, because a state that was lost is soon hidden by what comes after


def silence_experts(model: nn.Module, modules: Collection[nn.Module]) -> None:
    """Until `install`, routed experts answer zeros, so that a forward pass needs none of them."""
    register()
    for module in modules:
        module.moepic_layer = _zeros  # type: ignore[assignment]
    model.set_experts_implementation("moepic")  # type: ignore[operator]


@dataclass(frozen=True)
class Findings:
    kv_bytes: int  # keys, values and states of a full context
    continues: (
        bool  # a pass over several tokens may follow another; False: Transformers starts such a pass from nothing
    )


def probe_model(hf: HfModel, context: int) -> Findings:
    """Runs a few tokens, a few more after them, and all at once. Needs `silence_experts`."""
    ids = [(7 * place + 1) % 64 for place in range(_FIRST + _MORE)]
    hf.forward(ids[:_FIRST])
    few = hf.kv_bytes_by_layer()
    hf.forward(ids[_FIRST:])
    more, windows, apart = hf.kv_bytes_by_layer(), hf.kv_windows(), hf.recurrent_states()
    hf.forget()
    hf.forward(ids)
    together = hf.recurrent_states()
    hf.forget()
    continues = all(_close(mine, theirs) for mine, theirs in zip(apart, together, strict=True))
    return Findings(_kv_bytes(few, more, windows, context), continues)


def _close(a: Tensor, b: Tensor) -> bool:
    """Half precision differs by about 1 %; a state that began from nothing differs by its own size."""
    return float((a - b).float().norm()) <= 0.05 * float(b.float().norm())


def _kv_bytes(few: list[int], more: list[int], windows: list[int | None], context: int) -> int:
    """Extrapolates to `context` tokens (ours). Layers with a sliding window stop growing at its length; one layer
    counts twice, since growing it copies it."""
    per_layer = []
    for before, after, window in zip(few, more, windows, strict=True):
        per_token = (after - before) / _MORE
        constant = before - per_token * _FIRST
        per_layer.append(int(constant + per_token * min(context, window or context)))
    return sum(per_layer) + max(per_layer, default=0)


def _zeros(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    return hidden_states.new_zeros(hidden_states.shape)
