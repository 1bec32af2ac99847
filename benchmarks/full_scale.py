"""Real models on real cards, simulated: seconds per token against device memory, for every strategy.

`python -m benchmarks.full_scale [--tokens 200] [--points 6]`. Each preset model on a card that people would run it on,
the paper's two on the paper's card. Nothing here was measured: cards are data sheets, times estimates, routing is
synthetic (`moepic_core/presets.py`, `moepic_core/synthetic.py`); what compares are strategies. Plans know the tokens
before those that are counted, and so do caches. The last line is one JSON object; `benchmarks.tables` makes tables of
it, `benchmarks.draw` a picture.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.common import report
from moepic_core.errors import MoepicError
from moepic_core.links import parse_link
from moepic_core.needs import free_for_budget
from moepic_core.planner import make_plan
from moepic_core.presets import costs_for, machine_named, model_named, needs_for, profile_of, spec_of
from moepic_core.simulator import simulate
from moepic_core.spec import STRATEGIES, Settings
from moepic_core.synthetic import trace_for

PAIRS = (
    ("mixtral-8x7b", "a6000"),
    ("qwen1.5-moe-a2.7b", "a6000"),
    ("qwen3-30b-a3b", "rtx4090"),
    ("gpt-oss-20b", "rtx3060"),
    ("gpt-oss-120b", "rtx5090"),
    ("deepseek-v2-lite", "rtx4060"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="counted ones; five times as many come before")
    parser.add_argument("--points", type=int, default=6, help="budgets per model")
    options = parser.parse_args()
    rows = [row for model, machine in PAIRS for row in curves(model, machine, options.tokens, options.points)]
    report("full_scale", {"simulated": True, "counted_tokens": options.tokens, "rows": rows})
    return 0


def curves(model_name: str, machine_name: str, tokens: int, points: int) -> list[dict[str, Any]]:
    """All strategies under budgets from the smallest useful one to all that the card has or the model needs."""
    model, machine = model_named(model_name), machine_named(machine_name)
    spec = spec_of(model)
    needs, costs = needs_for(model, machine, 4096), costs_for(model, machine)
    trace = trace_for(model, 6 * tokens)
    free = free_for_budget(profile_of(machine), parse_link("auto", "cuda"), spec)
    first = needs.fixed + needs.staging_records * needs.record
    top = min(free, needs.everything)
    rows = []
    for point in range(1, points + 1):
        budget = first + (top - first) * point // points
        for strategy in STRATEGIES:
            settings = Settings.create(checkpoint=model.name, strategy=strategy, context_length=4096)
            try:
                plan = make_plan(settings, needs, budget, costs, trace.first(5 * tokens))
            except MoepicError as error:
                print(f"{model.title}, {strategy}: {error}", file=sys.stderr)
                continue
            result = simulate(trace, plan, costs, spec.moe_layers, warm_up=trace.num_tokens - tokens)
            rows.append({
                "model": model.title, "machine": machine.title, "strategy": strategy, "budget_bytes": budget,
                "share": sum(each.slots * each.top_rows * layer.row_bytes
                             for each, layer in zip(plan.layers, spec.moe_layers, strict=True))
                / sum(layer.layer_bytes for layer in spec.moe_layers),
                "tpot_s": result.tpot_s, "hit_rate": result.breakdown.hit_rate,
                "partial_hit_rate": result.breakdown.partial_hit_rate, "overlap": result.breakdown.overlap,
                "predicted_s": None if plan.predicted is None else plan.predicted.total_s,
                "mean_split": sum(each.split_ratio for each in plan.layers) / len(plan.layers),
            })  # fmt: skip
        print(f"{model.title} on {machine.title}: {budget / 1e9:.1f} GB", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
