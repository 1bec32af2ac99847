"""The experts function that Transformers calls in place of `eager`: routes → pieces from the residency → weighted sum.

One `ExpertLayer` per MoE layer, attached to its experts module. Transformers' dispatch (`ExpertsInterface.register`,
`set_experts_implementation`) is the door; there are no forward hooks and no model code of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from ..expert_math import Combine, ExpertMath, PairSum
from ..residency import Residency
from ..spec import MoeLayer
from ..step import Step
from .loading import layout_of

_NAME = "moepic"
Router = Callable[[Tensor], Tensor]  # router input [tokens, hidden] -> experts [tokens, k], best first


class ExpertLayer:
    """Computes one MoE layer's routed experts from wherever their segments are."""

    def __init__(self, module: nn.Module, geometry: MoeLayer, router: Router | None) -> None:
        self.geometry = geometry
        self.router = router
        self.math = math_of(module)
        self.position = -1
        self.residency: Residency | None = None
        self.waits = False  # for a device, whenever the host reads what was computed there
        self.next: ExpertLayer | None = None  # whose experts are prefetched while this layer computes

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` → `[tokens, hidden]`."""
        residency = self.residency
        assert residency is not None
        guesses: list[int] | None = None
        if residency.decode:
            chosen, guesses = self._read_choice(residency, hidden_states, top_k_index)
            # An index past the last expert means "none" in some families; its pair stays zero, as in `eager`.
            pairs: Mapping[int, int | Tensor] = {
                expert: place for place, expert in enumerate(chosen) if expert < self.geometry.num_experts
            }
            counts = dict.fromkeys(pairs, 1)
        else:
            pairs, counts = self._pairs_of_many(top_k_index)
        total = PairSum(hidden_states, top_k_index)
        with Step(residency, self.position, counts) as step:
            self._prefetch_next(residency, hidden_states, guesses)
            inputs: dict[int, Tensor] = {}
            only = self.math.prepare(hidden_states) if residency.decode else hidden_states
            for piece in step:
                expert = piece.expert
                pair = pairs[expert]
                if isinstance(pair, int):
                    x = only
                elif expert in inputs:
                    x = inputs.pop(expert)
                else:
                    x = inputs[expert] = self.math.gather(hidden_states, pair // top_k_index.shape[1])
                total.add(self.math.segment(x, piece.weights, expert, piece.start_row), pair)
        return total.total(top_k_weights, self.math.down_bias)

    def _read_choice(
        self, residency: Residency, hidden_states: Tensor, top_k_index: Tensor
    ) -> tuple[list[int], list[int] | None]:
        """The only token's experts; from a device also what the next router guesses, so that it is waited for once.

        On a CPU there is nothing to wait for, so that router is asked later, when demands are on their way.
        """
        router = self._next_router(residency) if self.waits else None
        if router is None:
            return top_k_index[0].tolist(), None
        both = torch.cat((top_k_index[0], router(hidden_states)[0])).tolist()
        k = top_k_index.shape[1]
        return both[:k], both[k:]

    def _pairs_of_many(self, top_k_index: Tensor) -> tuple[Mapping[int, int | Tensor], dict[int, int]]:
        """Expert → indices of its (token, k) pairs, and expert → their number; the most wanted experts first."""
        flat = top_k_index.reshape(-1)  # [tokens * k]
        order = torch.argsort(flat, stable=True)
        sizes = torch.bincount(flat, minlength=self.geometry.num_experts)[: self.geometry.num_experts].tolist()
        pairs: dict[int, int | Tensor] = {}
        start = 0
        for expert, size in enumerate(sizes):
            if size:
                pairs[expert] = order[start : start + size]
            start += size
        return pairs, {expert: sizes[expert] for expert in sorted(pairs, key=lambda expert: -sizes[expert])}

    def _next_router(self, residency: Residency) -> Router | None:
        """The router that guesses for the next layer, unless guesses are of no use or come from elsewhere."""
        if self.next is None or residency.matrices is not None or not residency.wants_guesses(self.next.position):
            return None
        return self.next.router

    def _prefetch_next(self, residency: Residency, hidden_states: Tensor, guesses: list[int] | None) -> None:
        """Wishes for the next layer; `guesses` are its router's for the only token, if they have been read already."""
        if self.next is None or not residency.wants_guesses(self.next.position):
            return
        if residency.matrices is not None:
            residency.prefetch(self.next.position, residency.matrices.rank(self.next.position))
            return
        num_experts = self.next.geometry.num_experts
        if guesses is None:
            if self.next.router is None:
                return
            ranked = self.next.router(hidden_states)  # [tokens, k]
            guesses = ranked[0].tolist() if residency.decode else _most_wanted(ranked, num_experts)
        residency.prefetch(self.next.position, [guess for guess in guesses if guess < num_experts])


def _most_wanted(ranked: Tensor, num_experts: int) -> list[int]:
    """The experts in `ranked` `[tokens, k]`, those that most tokens want first."""
    counts = torch.bincount(ranked.reshape(-1), minlength=num_experts)[:num_experts].tolist()
    return sorted((expert for expert in range(num_experts) if counts[expert]), key=lambda expert: -counts[expert])


def install(
    model: nn.Module, layers: Sequence[ExpertLayer], modules: Sequence[nn.Module], residency: Residency
) -> None:
    """Connects the layers with the residency and switches the model over."""
    register()
    for position, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        layer.position = position
        layer.residency = residency
        layer.waits = residency.arena.device.type != "cpu"
        layer.next = layers[(position + 1) % len(layers)]
        module.moepic_layer = layer  # type: ignore[assignment]
    model.set_experts_implementation(_NAME)  # type: ignore[operator]


def math_of(module: nn.Module) -> ExpertMath:
    """The module's activation and biases in the form that segments need."""
    layout = layout_of(module)
    first_bias = getattr(module, f"{layout.input_name}_bias", None) if module.has_bias else None
    down_bias = getattr(module, "down_proj_bias", None) if module.has_bias else None
    if not layout.has_gate:
        return ExpertMath(None, module.act_fn, None, first_bias, down_bias)  # type: ignore[arg-type]
    gate_bias = up_bias = None
    if first_bias is not None:
        if layout.is_concatenated:
            gate_bias, up_bias = first_bias.chunk(2, dim=-1)
        else:
            gate_bias, up_bias = first_bias[..., 0::2], first_bias[..., 1::2]
    return ExpertMath(_combine_of(module), None, gate_bias, up_bias, down_bias)


def _combine_of(module: nn.Module) -> Combine:
    apply_gate: Any = module._apply_gate
    if apply_gate.__func__ is _default_apply_gate:
        activation: Any = module.act_fn
        return lambda gate, up: activation(gate).mul_(up)
    if module.is_concatenated:
        return lambda gate, up: apply_gate(torch.cat((gate, up), dim=-1))
    return lambda gate, up: apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))


def router_of(model: nn.Module, path: str, geometry: MoeLayer, top_k: int) -> Router | None:
    """The router beside the experts at `path`, found by the shape of its weight; None when there is none to be found.

    Where the router itself answers with expert indices, it is asked; otherwise its logits are ranked.
    """
    block = model.get_submodule(path.rpartition(".")[0])
    shape = (geometry.num_experts, geometry.hidden)
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == shape:
            return _asked(module, weight, top_k)
    return None


def _asked(module: nn.Module, weight: Tensor, top_k: int) -> Router:
    probe = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        answer = module(probe)
    except (TypeError, RuntimeError):
        answer = None  # it wants more than the hidden states: rank its logits instead
    if isinstance(answer, tuple):
        place = next(
            (i for i, part in enumerate(answer) if part.dtype == torch.int64 and part.shape == (1, top_k)), None
        )
        scores = next(
            (i for i, part in enumerate(answer) if part.is_floating_point() and part.shape == (1, top_k)), None
        )
        if place is not None and scores is not None:
            return functools.partial(_by_own_choice, module, place, scores)
    return functools.partial(_by_logits, weight, getattr(module, "bias", None), top_k)


def _by_own_choice(module: nn.Module, place: int, scores: int, x: Tensor) -> Tensor:
    answer = module(x)
    order = answer[scores].argsort(dim=-1, descending=True)
    return answer[place].gather(-1, order)  # type: ignore[no-any-return]


def _by_logits(weight: Tensor, bias: Tensor | None, top_k: int, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to(weight.dtype), weight, bias).topk(top_k, dim=-1).indices


@functools.cache
def register() -> None:
    """Makes the experts function known to Transformers, once."""
    ExpertsInterface.register(_NAME, _forward)


def _forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    layer: Any = module.moepic_layer
    return layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
