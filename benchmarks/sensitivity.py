"""What the method's constants and parts are worth, without a clock: hit rates from traces, times from the simulator.

`python -m benchmarks.sensitivity`. Eviction policies on a recorded trace and on a synthetic one, over all tokens and
right after a change of subject; LCP's ρ and ω. Then, simulated with the times that the paper gives for its Mixtral:
all strategies, one split ratio everywhere, and coarser steps of the planner. The same on every machine. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from moepic_core.costs import Costs
from moepic_core.eviction import EvictionPolicy, Lcp, LcpAged
from moepic_core.frontier import STEPS_PER_LAYER
from moepic_core.hit_curves import belady_hits, ranks
from moepic_core.planner import Outlook
from moepic_core.presets import costs_for, machine_named, model_named, needs_for, spec_of
from moepic_core.routing import RoutingTrace
from moepic_core.simulator import simulate
from moepic_core.spec import STRATEGIES, ModelSpec, Settings
from moepic_core.synthetic import trace_for
from moepic_core.trace_file import load_trace

RECORDED = Path(__file__).resolve().parent.parent / "assets" / "traces" / "demo-moe.npz"
SHARES = (1 / 6, 1 / 3, 1 / 2, 5 / 8)
POLICIES = ("lcp", "lcp-aged", "lru", "lfu", "random")
KNOWN, COUNTED = 1000, 200  # tokens of a simulation: what plans and caches know, and what is timed
FRESH_TOKENS = 64  # that count as right after a change of subject
MODEL, MACHINE = "mixtral-8x7b", "a6000"
COMPUTE_S, LOAD_S = 0.057, 0.165  # of a token, and of all its experts, there (arXiv 2509.08342)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    traces = {"recorded": load_trace(RECORDED), "synthetic": trace_for(model_named("qwen1.5-moe-a2.7b"), 3000)}
    results: dict[str, Any] = {
        name: {"source": trace.source, "policies": policies(trace), "constants": constants(trace)}
        for name, trace in traces.items()
    }
    print("policies and constants: done", file=sys.stderr)
    report("sensitivity", {**results, "simulated": True, "paper": paper(), "splits": splits(), "steps": steps()})
    return 0


def policies(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Hit rates of each policy for each share of experts cached, of all tokens and of those after a change."""
    used = trace.experts >= 0
    changes = np.flatnonzero(np.diff(trace.subjects)) + 1
    fresh = np.zeros(trace.num_tokens, bool)
    for change in changes:
        fresh[change : change + FRESH_TOKENS] = True
    rows = []
    for policy in POLICIES:
        found = ranks(policy, trace).experts
        for share in SHARES:
            slots = [round(share * count) for count in trace.num_experts]
            hits = (found >= 0) & (found < np.array(slots)[:, None])
            rows.append({"policy": policy, "share": share, "hit_rate": float(hits.sum() / used.sum()),
                         "after_a_change": float(hits[fresh].sum() / used[fresh].sum())})  # fmt: skip
    for share in SHARES:
        hits = np.stack([
            belady_hits(trace.experts[:, layer], round(share * count), count)
            for layer, count in enumerate(trace.num_experts)
        ], axis=1)  # fmt: skip
        rows.append({"policy": "belady", "share": share, "hit_rate": float(hits.sum() / used.sum()),
                     "after_a_change": float(hits[fresh].sum() / used[fresh].sum())})  # fmt: skip
    return rows


def constants(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Hit rates at one third cached for other ρ and ω than the paper's, of the paper's rule and of the ageing one."""
    rows = []
    for rule in (Lcp, LcpAged):
        for rho in (0.1, 0.25, 0.5):
            for omega in (16, 32, 64, 128, 256, 512):
                other = type(rule.__name__, (rule,), {"_DECAY_PER_TOKEN": -log2(rho) / omega})
                rows.append({"rule": rule.__name__, "rho": rho, "omega": omega, "hit_rate": hit_rate(other, trace)})
    return rows


def hit_rate(policy: Callable[[int], EvictionPolicy], trace: RoutingTrace) -> float:
    """One third of the experts cached, whole, by the engine's rules in decode."""
    hits = uses = 0
    for layer, count in enumerate(trace.num_experts):
        memory, cached = policy(count), set[int]()
        for now, row in enumerate(trace.experts[:, layer].tolist()):
            experts = [expert for expert in row if expert >= 0]
            for expert in experts:
                memory.touch(expert, now)
            hits += sum(expert in cached for expert in experts)
            uses += len(experts)
            for expert in experts:
                if expert not in cached:
                    if len(cached) == round(count / 3):
                        candidates = cached.difference(experts)
                        if not candidates:
                            continue
                        cached.remove(memory.victim(candidates, now))
                    cached.add(expert)
    return hits / uses


def paper() -> list[dict[str, Any]]:
    """All strategies on Mixtral with the times that the paper gives, for five shares of the experts cached."""
    return [
        {"strategy": name, "share": share, "tpot_s": simulated(share, strategy=name)}
        for share in (1 / 6, 1 / 3, 1 / 2, 5 / 8, 4 / 5)
        for name in STRATEGIES
    ]


def splits() -> list[dict[str, Any]]:
    """One split ratio everywhere, and the planned ones (None)."""
    ratios = (*np.linspace(0.1, 1, 10).round(1).tolist(), None)
    return [
        {"share": share, "split": split, "tpot_s": simulated(share, split=split)}
        for share in (1 / 3, 5 / 8)
        for split in ratios
    ]


def steps() -> list[dict[str, Any]]:
    """Coarser steps of the planner, as shares of all layers' memory; divided by `share` they are those of the budget.

    So the paper's 1 % and 5 % of the budget lie among them: one step is 0.6 to 9.4 % of it at a third cached, 0.3 to
    5.0 % at 5/8. A step of more than a layer does not exist, because no layer could spend it.
    """
    num_layers = len(spec_of(model_named(MODEL)).moe_layers)
    return [
        {"share": share, "step": 1 / (number * num_layers), "tpot_s": simulated(share, steps_per_layer=number)}
        for share in (1 / 3, 5 / 8)
        for number in (16, 8, 4, 3, 2, 1)
    ]


def simulated(
    share: float, strategy: str = "moepic", split: float | None = None, steps_per_layer: int = STEPS_PER_LAYER
) -> float:
    """Seconds per token with room for `share` of the experts; plan and caches know the tokens before those counted."""
    model, machine = model_named(MODEL), machine_named(MACHINE)
    spec, needs = spec_of(model), needs_for(model, machine, 4096)
    costs = as_published(costs_for(model, machine), spec)
    trace = trace_for(model, KNOWN + COUNTED)
    settings = Settings.create(checkpoint=model.name, strategy=strategy, split=split, context_length=4096)
    experts = sum(layer.layer_bytes for layer in spec.moe_layers)
    budget = needs.fixed + needs.staging_records * needs.record + int(share * experts)
    plan = Outlook(settings, needs, costs, trace.first(KNOWN), budget, steps_per_layer).plan(budget)
    return simulate(trace, plan, costs, spec.moe_layers, warm_up=KNOWN).tpot_s


def as_published(costs: Costs, spec: ModelSpec) -> Costs:
    """The estimate, scaled to the paper's two sums: a token's computing, and loading all of its experts."""
    neurons = spec.moe_layers[0].neurons
    resident_s = costs.after_s + sum(
        layer.before_s + layer.step_s + spec.top_k * (layer.segment_s + neurons * layer.row_s) for layer in costs.layers
    )
    factor = COMPUTE_S / resident_s
    layers = tuple(
        replace(layer, before_s=factor * layer.before_s, step_s=factor * layer.step_s, guess_s=factor * layer.guess_s,
                segment_s=factor * layer.segment_s, row_s=factor * layer.row_s,
                transfer_s=factor * layer.transfer_s)
        for layer in costs.layers
    )  # fmt: skip
    active_bytes = sum(spec.top_k * layer.expert_bytes for layer in spec.moe_layers)
    return replace(costs, layers=layers, after_s=factor * costs.after_s, link_bytes_per_s=active_bytes / LOAD_S)


if __name__ == "__main__":
    raise SystemExit(main())
