"""`moepic simulate`: a model on a graphics card by name, replayed without either. What it shows says "simulated".

Plans know the tokens before those that are counted, and so do caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ..errors import BadSettings, OutOfRoom
from ..spec import STRATEGIES, Settings
from ..units import format_bytes
from .options import add_json, count

HELP = "a model on a graphics card by name, replayed without either"


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="such as qwen3-30b-a3b; a wrong name lists all")
    command.add_argument("--machine", required=True, help="such as rtx4090; a wrong name lists all")
    command.add_argument(
        "--vram", default="auto", help='device budget: 12GB, 12GiB, 50%% of what everything needs, or "50%% of experts"'
    )
    command.add_argument("--strategy", default="all", help=f"all, {', '.join(STRATEGIES)}")
    command.add_argument("--context-length", type=int, metavar="N", help="tokens that KV memory is reserved for")
    command.add_argument("--tokens", type=count, default=400, metavar="N", help="counted tokens of the replay")
    command.add_argument("--trace", type=Path, help="routing to replay; the default is synthetic")
    add_json(command)


def run(options: argparse.Namespace) -> None:
    from ..budgets import budget_bytes
    from ..links import parse_link
    from ..needs import free_for_budget
    from ..planner import make_plan
    from ..presets import costs_for, machine_named, model_named, needs_for, profile_of, spec_of
    from ..simulator import simulate
    from ..synthetic import trace_for
    from ..trace_file import load_trace

    model, machine = model_named(options.model), machine_named(options.machine)
    spec, profile = spec_of(model), profile_of(machine)
    needs, costs = needs_for(model, machine, options.context_length), costs_for(model, machine)
    trace = load_trace(options.trace) if options.trace else trace_for(model, 3 * options.tokens)
    if trace.num_experts != tuple(layer.num_experts for layer in spec.moe_layers):
        raise BadSettings(f"the trace {options.trace} is of another model than {model.title}")
    budget = budget_bytes(options.vram, needs, free_for_budget(profile, parse_link("auto", "cuda"), spec))
    if budget > profile.device_total_bytes:
        raise OutOfRoom(
            f"a budget of {format_bytes(budget)} is more than the {format_bytes(profile.device_total_bytes)} of "
            f"{machine.title}; lower it or choose a larger card"
        )
    names = list(STRATEGIES) if options.strategy == "all" else [options.strategy]
    warm_up = max(0, trace.num_tokens - options.tokens)
    rows = []
    for name in names:
        settings = Settings.create(checkpoint=model.name, strategy=name, vram=options.vram)
        plan = make_plan(settings, needs, budget, costs, trace.first(warm_up))
        result = simulate(trace, plan, costs, spec.moe_layers, warm_up=warm_up)
        rows.append({"strategy": name, **dataclasses.asdict(result.breakdown), "tpot_s": result.tpot_s,
                     "tokens_per_s": 1 / result.tpot_s, "source": result.source})  # fmt: skip
    facts = {"model": model.title, "machine": machine.title, "budget_bytes": budget, "simulated": True, "rows": rows}
    if options.json:
        print(json.dumps(facts))
        return
    print(f"SIMULATED: {model.title} on {machine.title}, {format_bytes(budget)}; {rows[0]['source']}")
    print(f"{'strategy':20}{'ms/token':>10}{'tokens/s':>10}{'hits':>8}{'partial':>9}{'misses':>8}{'stall ms':>10}")
    for row in rows:
        print(
            f"{row['strategy']:20}{1e3 * row['tpot_s']:10.1f}{row['tokens_per_s']:10.1f}{100 * row['hit_rate']:7.0f}%"
            f"{100 * row['partial_hit_rate']:8.0f}%{100 * row['miss_rate']:7.0f}%{1e3 * row['stall_s']:10.1f}"
        )
