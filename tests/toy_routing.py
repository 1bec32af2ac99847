"""Small models on made-up machines, with random routing of stated skew: what cost model and planner are tested on."""

from __future__ import annotations

import numpy as np

from moepic_core.budgets import Needs
from moepic_core.costs import Costs, LayerCosts
from moepic_core.routing import RoutingTrace
from moepic_core.spec import MoeLayer


def toy_trace(
    seed: int, tokens: int = 80, layers: int = 3, num_experts: int = 8, top_k: int = 2, accuracy: float = 0.7
) -> RoutingTrace:
    """Each layer has a Zipf law of its own; a wrong guess is any other expert."""
    generator = np.random.default_rng(seed)
    experts, guesses = np.empty((2, tokens, layers, top_k), np.int16)
    for layer in range(layers):
        weights = generator.permutation((1 + np.arange(num_experts)) ** -generator.uniform(0, 2))
        # The smallest of exponential variables over weights are draws without replacement.
        order = (generator.standard_exponential((tokens, num_experts)) / weights).argsort(axis=1)
        used, others = order[:, :top_k], np.full((tokens, top_k), -1)
        unused = order[:, top_k : 2 * top_k]
        others[:, : unused.shape[1]] = unused
        experts[:, layer] = used
        guesses[:, layer] = np.where(generator.random(used.shape) < accuracy, used, others)
    return RoutingTrace(
        experts, guesses, (num_experts,) * layers, np.zeros(tokens, np.int32), np.zeros(tokens, np.int16), ("",), "toy"
    )


def toy_layer(neurons: int = 40, hidden: int = 128, num_experts: int = 8) -> MoeLayer:
    return MoeLayer(0, num_experts, neurons, hidden, matrices=3, itemsize=4)


def toy_costs(layer: MoeLayer, layers: int, top_k: int, ratio: float, admit_s: float = 0.0, drag: float = 0.0) -> Costs:
    """A machine on which loading a token's experts takes `ratio` times as long as computing it."""
    costs = LayerCosts(
        before_s=4e-5,
        step_s=1e-5,
        guess_s=5e-6,
        segment_s=5e-6,
        row_s=2e-5 / layer.neurons,
        admit_s=admit_s,
        transfer_s=1e-6,
        drag=drag,
    )
    after_s = 1e-4
    compute_s = layers * (5e-5 + top_k * 2.5e-5) + after_s
    link_bytes_per_s = layers * top_k * layer.expert_bytes / (ratio * compute_s)
    return Costs((costs,) * layers, after_s, link_bytes_per_s, 1e-7, 1 << 14, "measured")


class Toy:
    """A model, a machine and a trace, all by one seed."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.top_k = int(generator.integers(1, 5))
        num_experts = int(generator.integers(self.top_k, 14))
        num_layers = int(generator.integers(1, 6))
        self.layer = toy_layer(int(generator.integers(1, 80)), int(generator.integers(16, 200)), num_experts)
        self.layers = (self.layer,) * num_layers
        self.needs = Needs(self.layers, self.top_k, resident=0, kv=0, workspace=0)
        ratio, drag = 10 ** generator.uniform(-0.5, 1.5), 0.1 * (seed % 4)
        self.costs = toy_costs(self.layer, num_layers, self.top_k, ratio, drag=drag)
        self.trace = toy_trace(seed, 80, num_layers, num_experts, self.top_k, generator.uniform(0, 1))

    @property
    def staged(self) -> int:
        """The budget with complete staging and no cache."""
        return self.needs.fixed + self.needs.staging_records * self.needs.record
