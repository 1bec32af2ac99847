"""How long planning takes, without engine or checkpoint.

`python -m benchmarks.plan [--layers 64] [--experts 256] [--top-k 8] [--tokens 5000] [--rounds 5]`. A made-up large
model on a made-up machine, with a synthetic trace. Statistics (what any size of cache would have hit) are prepared once
for a trace and serve every budget; of a model this large they cover the newest 256 tokens (`tokens_replayed`). Then
come the first plan (`both`: all that `planner.make_plan` does), a plan for one more budget, and a curve of 40 budgets
as under the slider. One thread. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from benchmarks.common import ForeignLoad, report
from moepic_core.budgets import Needs
from moepic_core.costs import Costs, LayerCosts
from moepic_core.planner import EXPERTS_REPLAYED, FEWEST_TOKENS, Outlook
from moepic_core.spec import MoeLayer, Settings
from moepic_core.synthetic import HABITS, synthesize

SETTINGS = Settings(checkpoint="synthetic")
HABIT = "qwen3-30b-a3b"  # a model of many small experts
PARTS = ("statistics", "first_plan", "both", "next_plan", "curve_of_40")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    needs, costs = made_up(options.layers, options.experts, options.top_k)
    trace = synthesize(HABITS[HABIT], options.layers, options.experts, options.top_k, options.tokens)
    replayed = min(options.tokens, max(FEWEST_TOKENS, EXPERTS_REPLAYED // (options.layers * options.experts)))
    foreign, times = ForeignLoad(), []
    for _ in range(options.rounds):
        start = time.perf_counter()
        outlook = Outlook(SETTINGS, needs, costs, trace, needs.everything)
        prepared = time.perf_counter()
        plan = outlook.plan(needs.everything // 3)
        first = time.perf_counter()
        outlook.plan(needs.everything // 2)
        following = time.perf_counter()
        outlook.plans([needs.everything * part // 50 for part in range(10, 50)])
        end = time.perf_counter()
        times.append((prepared - start, first - prepared, first - start, following - first, end - following))
    medians = {f"{part}_s": median(each) for part, each in zip(PARTS, zip(*times, strict=True), strict=True)}
    for part, seconds in medians.items():
        print(f"{part:14} {seconds:6.3f}")
    print(plan.reason)
    slowest = max(both for _, _, both, *_ in times)
    report("plan", {
        "layers": options.layers, "experts": options.experts, "top_k": options.top_k, "tokens": options.tokens,
        "tokens_replayed": replayed, "rounds": options.rounds, "foreign_cores": foreign.cores(), **medians,
        "slowest_both_s": slowest,
    })  # fmt: skip


def made_up(num_layers: int, num_experts: int, top_k: int) -> tuple[Needs, Costs]:
    """A model of small experts, as large ones have, on a machine with a fast card."""
    layer = MoeLayer(0, num_experts, neurons=768, hidden=2048, matrices=3, itemsize=2)
    needs = Needs((layer,) * num_layers, top_k, resident=2 << 30, kv=1 << 30, workspace=1 << 29)
    costs = Costs(
        (LayerCosts(8e-5, 2e-5, 1e-5, 1.2e-5, 2e-5 / layer.neurons, 1e-12, 5e-6),) * num_layers,
        after_s=2e-4, link_bytes_per_s=20e9, link_latency_s=1e-5, chunk_bytes=2 << 20, source="estimated",
    )  # fmt: skip
    return needs, costs


if __name__ == "__main__":
    main()
