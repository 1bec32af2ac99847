"""The commands that look ahead: `plan` for a checkpoint on this machine, `simulate` for a model on a card by name.

Part of the command line, and like `cli` a printer. `plan` reads headers and what earlier sessions measured; with
`--measure` it loads the model and measures anew. What `simulate` shows is simulated and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .costs import Breakdown
from .errors import BadSettings
from .folders import user_folder
from .spec import STRATEGIES, Plan, Settings
from .units import format_bytes

if TYPE_CHECKING:
    from .planner import Needs
    from .routing import RoutingTrace

_POINTS = 12  # of the curve over budgets


def add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--measure", action="store_true", help="load the model and measure this machine first")
    command.add_argument("--trace", type=Path, help="routing to plan for; the default is that of earlier sessions")


def add_simulate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="such as qwen3-30b-a3b; a wrong name lists all")
    command.add_argument("--machine", required=True, help="such as rtx4090; a wrong name lists all")
    command.add_argument(
        "--vram", default="auto", help='device budget: 12GB, 12GiB, 50%% of what everything needs, or "50%% of experts"'
    )
    command.add_argument("--strategy", default="all", help=f"all, {', '.join(STRATEGIES)}")
    command.add_argument("--context-length", type=int, metavar="N", help="tokens that KV memory is reserved for")
    command.add_argument("--tokens", type=int, default=400, metavar="N", help="counted tokens of the replay")
    command.add_argument("--trace", type=Path, help="routing to replay; the default is synthetic")
    command.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run_plan(options: argparse.Namespace, settings: Settings) -> None:
    from .calibrate import probe
    from .checkpoint import read_spec
    from .finder import resolve
    from .links import parse_link
    from .memory import Memory
    from .needs import free_for_budget, needs_of
    from .planner import budget_bytes, make_plan, what_if
    from .steering import costs_key

    spec = read_spec(resolve(settings.checkpoint, settings.revision), settings.dtype)
    machine = probe(settings.device)
    link = parse_link(settings.link, machine.device)
    memory = Memory(user_folder())
    if options.measure:
        _measure(settings)
    needs = needs_of(settings, spec, machine)
    costs = memory.costs(costs_key(spec, machine, link.label))
    trace = _read(options.trace) if options.trace else memory.trace(spec.fingerprint)
    free = free_for_budget(machine, link, spec)
    budget = budget_bytes(settings.vram, needs, free)
    plan = make_plan(settings, needs, budget, costs, trace)
    top = min(free, needs.everything)
    curve = [] if costs is None or trace is None else what_if(settings, needs, costs, trace, _budgets(needs, top))
    facts = {
        "model": spec.name, "link": link.label, "measured": costs is not None, "plan": dataclasses.asdict(plan),
        "tokens_of_routing": 0 if trace is None else trace.num_tokens,
        "tpot_s": None if plan.predicted is None else plan.predicted.total_s,
        "curve": [{"budget_bytes": at, "tpot_s": cost.total_s, "hit_rate": cost.hit_rate} for at, cost in curve],
    }  # fmt: skip
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{spec.name} over {link.label}: {plan.reason}")
    for line in [*_table(plan, needs), *_prediction(plan.predicted), *_curve(curve)]:
        print(line)
    if costs is None:
        print("nothing was measured here yet; --measure loads the model and takes a few seconds", file=sys.stderr)


def run_simulate(options: argparse.Namespace) -> None:
    from .links import parse_link
    from .needs import free_for_budget
    from .planner import budget_bytes, make_plan
    from .presets import costs_for, machine_named, model_named, needs_for, profile_of, spec_of
    from .simulator import simulate
    from .synthetic import trace_for

    model, machine = model_named(options.model), machine_named(options.machine)
    spec, profile = spec_of(model), profile_of(machine)
    needs, costs = needs_for(model, machine, options.context_length), costs_for(model, machine)
    trace = _read(options.trace) if options.trace else trace_for(model, 3 * options.tokens)
    if trace.num_experts != tuple(layer.num_experts for layer in spec.moe_layers):
        raise BadSettings(f"the trace {options.trace} is of another model than {model.title}")
    budget = budget_bytes(options.vram, needs, free_for_budget(profile, parse_link("auto", "cuda"), spec))
    names = list(STRATEGIES) if options.strategy == "all" else [options.strategy]
    warm_up = max(0, trace.num_tokens - options.tokens)
    rows = []
    for name in names:
        settings = Settings.create(checkpoint=model.name, strategy=name, vram=options.vram)
        plan = make_plan(settings, needs, budget, costs, trace.last(trace.num_tokens))
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


def _measure(settings: Settings) -> None:
    from .calibration import calibrate
    from .engine import Engine

    with Engine.load(settings, memory=user_folder()) as engine:
        calibrate(engine, lambda share: print(f"measuring {100 * share:.0f} %", file=sys.stderr))


def _read(path: Path) -> RoutingTrace:
    from .trace_file import load_trace

    return load_trace(path)


def _budgets(needs: Needs, top: int) -> list[int]:
    first = needs.fixed + needs.staging_records * needs.record
    step = max(1, (top - first) // (_POINTS - 1))
    return [first + number * step for number in range(_POINTS)] if top > first else [top]


def _table(plan: Plan, needs: Needs) -> list[str]:
    """One line for each run of layers that share a plan."""
    lines = [f"{'layers':>10}{'slots':>10}{'split':>8}{'on the device':>16}"]
    shares = list(zip(plan.layers, needs.layers, strict=True))
    start = 0
    for place in range(1, len(shares) + 1):
        if place < len(shares) and shares[place] == shares[start]:
            continue
        share, layer = shares[start]
        name = f"{start}" if place == start + 1 else f"{start}–{place - 1}"
        size = format_bytes(share.slots * share.top_rows * layer.row_bytes)
        lines.append(f"{name:>10}{share.slots:6} /{layer.num_experts:3}{share.split_ratio:8.2f}{size:>16}")
        start = place
    return lines


def _prediction(predicted: Breakdown | None) -> list[str]:
    if predicted is None:
        return []
    parts = [("attention, routers", predicted.before_s), ("experts", predicted.experts_s),
             ("stall", predicted.stall_s), ("head", predicted.after_s)]  # fmt: skip
    items = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts)
    return [
        f"predicted {1e3 * predicted.total_s:.2f} ms per token, {1 / predicted.total_s:.1f} tokens/s ({items} ms); "
        f"hits {100 * predicted.hit_rate:.0f} %, partial {100 * predicted.partial_hit_rate:.0f} %, "
        f"{format_bytes(predicted.link_bytes)} over the link"
    ]


def _curve(curve: Sequence[tuple[int, Breakdown]]) -> list[str]:
    return [f"{format_bytes(budget):>12}  {1 / cost.total_s:8.1f} tokens/s" for budget, cost in curve]


def compared(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of strategies side by side, each with its replies."""
    import statistics

    lines = [f"{'strategy':20}{'ms/token':>10}{'hits':>8}{'partial':>9}{'misses':>8}{'overlap':>9}"]
    for name, replies in rows.items():
        tpot = statistics.median(reply["tpot_s"] for reply in replies)
        last = replies[-1]
        shares = [f"{100 * (last[key] or 0):.0f}%" for key in ("hit_rate", "partial_hit_rate", "miss_rate", "overlap")]
        lines.append(f"{name:20}{1e3 * tpot:10.1f}{shares[0]:>8}{shares[1]:>9}{shares[2]:>8}{shares[3]:>9}")
    return lines
