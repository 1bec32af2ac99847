"""What a loaded model needs beyond weights, found by running it for a moment without its experts. Called once at load."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .experts import register
from .model import HfModel, tensor_bytes

_PROBE_TOKENS = 8


@contextmanager
def without_experts(model: nn.Module, modules: Collection[nn.Module]) -> Iterator[None]:
    """Within, routed experts answer zeros, so that a forward pass needs none of them."""
    register()
    for module in modules:
        module.moepic_layer = _zeros  # type: ignore[assignment]
    model.set_experts_implementation("moepic")  # type: ignore[operator]
    yield


def kv_needed(hf: HfModel, context: int) -> int:
    """Bytes of keys, values and states for `context` tokens, from what a few tokens took (ours).

    Layers with a sliding window stop growing at its length. One layer counts twice, since growing it copies it.
    """
    hf.forward([0] * _PROBE_TOKENS)
    few = hf.kv_bytes_by_layer()
    hf.forward([0] * _PROBE_TOKENS)
    more = hf.kv_bytes_by_layer()
    windows = hf.kv_windows()
    hf.forget()
    per_layer = []
    for before, after, window in zip(few, more, windows, strict=True):
        per_token = (after - before) / _PROBE_TOKENS
        constant = before - per_token * _PROBE_TOKENS
        per_layer.append(int(constant + per_token * min(context, window or context)))
    return sum(per_layer) + max(per_layer, default=0)


def _zeros(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    return hidden_states.new_zeros(hidden_states.shape)
