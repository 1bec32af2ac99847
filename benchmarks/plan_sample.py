"""What it loses to plan a large model from its newest tokens only.

`python -m benchmarks.plan_sample [--layers 64] [--experts 256]`. Planning must not take longer than a second, so of
such a model the planner replays the newest 256 of 5,000 known tokens (`planner.FEWEST_TOKENS`). Here plans are made
from fewer and from more, and all are judged by the tokens that come next, in caches that knew all of the 5,000: how
much slower each is than the plan from everything, and how far its prediction is off. Synthetic routing that changes its
subject every 512 tokens, a link that takes 2.9 times as long as computing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from benchmarks.common import report
from benchmarks.plan import HABIT, SETTINGS, made_up
from moepic_core import planner
from moepic_core.budgets import Needs
from moepic_core.cost_model import table, walk
from moepic_core.costs import Costs
from moepic_core.spec import Plan
from moepic_core.synthetic import HABITS, synthesize
from moepic_core.workload import Replay, replay, workload

KNOWN, NEXT = 5000, 512
SHARES = (1 / 6, 1 / 3, 1 / 2, 5 / 8, 4 / 5)  # of all experts' bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, KNOWN])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    needs, costs = made_up(options.layers, options.experts, options.top_k)
    computing_s = sum(layer.before_s + layer.step_s + 8 * 3.2e-5 for layer in costs.layers)
    active_bytes = options.top_k * sum(layer.expert_bytes for layer in needs.layers)
    costs = replace(costs, link_bytes_per_s=active_bytes / (2.9 * computing_s))
    experts = sum(layer.layer_bytes for layer in needs.layers)
    budgets = [needs.fixed + needs.staging_records * needs.record + int(share * experts) for share in SHARES]
    rows = []
    for seed in range(options.seeds):
        trace = synthesize(HABITS[HABIT], options.layers, options.experts, options.top_k, KNOWN + NEXT, seed)
        known, replays = trace.first(KNOWN), {}
        for tokens in options.tokens:
            planner.FEWEST_TOKENS = tokens  # the only thing that differs
            started = time.perf_counter()
            plans = planner.Outlook(SETTINGS, needs, costs, known, max(budgets)).plans(budgets)
            seconds = time.perf_counter() - started
            for share, plan in zip(SHARES, plans, strict=True):
                if plan.eviction not in replays:
                    replays[plan.eviction] = replay(trace, plan.eviction, "next-router")
                assert plan.predicted is not None
                rows.append({
                    "seed": seed, "tokens": tokens, "share": share, "eviction": plan.eviction, "planning_s": seconds,
                    "predicted_s": plan.predicted.total_s, "truth_s": truth(replays[plan.eviction], plan, needs, costs),
                })  # fmt: skip
    summary = {tokens: summed(rows, tokens) for tokens in options.tokens}
    for tokens, each in summary.items():
        print(tokens, each)
    report("plan_sample", {"layers": options.layers, "experts": options.experts, "summary": summary, "rows": rows})


def truth(known: Replay, plan: Plan, needs: Needs, costs: Costs) -> float:
    """What a token after the first KNOWN ones costs under `plan`."""
    work = workload(known, plan.prefetch_depth, start=KNOWN)
    return float(walk(work, needs.layers, costs, *table(plan.layers)).total_s[0])


def summed(rows: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Of plans from so many tokens: times slower than those from all, and how far predictions are from the truth."""
    best = {(row["seed"], row["share"]): row["truth_s"] for row in rows if row["tokens"] == KNOWN}
    own = [row for row in rows if row["tokens"] == tokens]
    slower = np.array([row["truth_s"] / best[row["seed"], row["share"]] - 1 for row in own])
    off = np.array([abs(row["predicted_s"] / row["truth_s"] - 1) for row in own])
    return {
        "slower": round(float(slower.mean()), 4), "slower_worst": round(float(slower.max()), 4),
        "off": round(float(off.mean()), 4), "off_worst": round(float(off.max()), 4),
        "planning_s": round(float(np.mean([row["planning_s"] for row in own])), 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
