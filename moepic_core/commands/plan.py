"""`moepic plan`: what each layer would get under a budget, and how fast that would be.

Reads headers and what earlier sessions measured; with `--measure` it loads the model and measures anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..costs import Breakdown, Costs
from ..folders import user_folder
from ..spec import Plan, Settings
from ..units import format_bytes
from .options import add_checkpoint, settings_of

if TYPE_CHECKING:
    from ..budgets import Needs

_POINTS = 12  # of the curve over budgets

HELP = "what each layer would get under a budget, and how fast that would be"


def add_options(command: argparse.ArgumentParser) -> None:
    add_checkpoint(command)
    command.add_argument("--measure", action="store_true", help="load the model and measure this machine first")
    command.add_argument("--trace", type=Path, help="routing to plan for; the default is that of earlier sessions")


def run(options: argparse.Namespace) -> None:
    from ..budgets import budget_bytes
    from ..calibrate import probe
    from ..checkpoint import read_spec
    from ..finder import resolve
    from ..links import parse_link
    from ..memory import Memory
    from ..needs import free_for_budget, needs_of
    from ..planner import make_plan, what_if
    from ..steering import costs_key
    from ..trace_file import load_trace

    settings = settings_of(options)
    spec = read_spec(resolve(settings.checkpoint, settings.revision), settings.dtype)
    machine = probe(settings.device)
    link = parse_link(settings.link, machine.device)
    memory = Memory(user_folder())
    if options.measure:
        _measure(settings)
    needs = needs_of(settings, spec, machine)
    costs = memory.costs(costs_key(spec, machine, link.label))
    trace = load_trace(options.trace) if options.trace else memory.trace(spec.fingerprint)
    free = free_for_budget(machine, link, spec)
    budget = budget_bytes(settings.vram, needs, free)
    plan = make_plan(settings, needs, budget, costs, trace)
    top = min(free, needs.everything)
    curve = [] if costs is None or trace is None else what_if(settings, needs, costs, trace, _budgets(needs, top))
    facts = {
        "model": spec.name, "link": link.label, "measured": costs is not None, "plan": dataclasses.asdict(plan),
        "machine": dataclasses.asdict(machine), "costs": None if costs is None else dataclasses.asdict(costs),
        "tokens_of_routing": 0 if trace is None else trace.num_tokens,
        "tpot_s": None if plan.predicted is None else plan.predicted.total_s,
        "curve": [{"budget_bytes": at, "tpot_s": cost.total_s, "hit_rate": cost.hit_rate} for at, cost in curve],
    }  # fmt: skip
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{spec.name} over {link.label}: {plan.reason}")
    for line in [*_table(plan, needs), *_measured(costs), *_prediction(plan.predicted), *_curve(curve)]:
        print(line)
    if costs is None:
        print("nothing was measured here yet; --measure loads the model and takes a few seconds", file=sys.stderr)


def _measure(settings: Settings) -> None:
    from ..calibration import calibrate
    from ..engine import Engine

    with Engine.load(settings, memory=user_folder()) as engine:
        calibrate(engine, lambda share: print(f"measuring {100 * share:.0f} %", file=sys.stderr))


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


def _measured(costs: Costs | None) -> list[str]:
    if costs is None or costs.alone is None:
        return []
    alone, accuracy = costs.alone, [share for ranks in costs.guess_accuracy for share in ranks]
    guesses = f"; {sum(accuracy) / len(accuracy):.0%} of guesses right" if accuracy else ""
    return [
        f"measured: link {format_bytes(alone.bytes_per_s)}/s alone, {format_bytes(costs.link_bytes_per_s)}/s while "
        f"computing, {1e6 * costs.link_latency_s:.0f} µs per transfer; host memory copies "
        f"{format_bytes(alone.host_bytes_per_s)}/s{guesses}"
    ]


def _prediction(predicted: Breakdown | None) -> list[str]:
    if predicted is None:
        return []
    parts = [("attention, routers", predicted.before_s), ("experts", predicted.experts_s),
             ("stall", predicted.stall_s), ("head", predicted.after_s)]  # fmt: skip
    items = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts)
    return [
        f"predicted {1e3 * predicted.total_s:.2f} ms per token, {1 / predicted.total_s:.1f} tokens/s ({items} ms); "
        f"hits {100 * predicted.hit_rate:.0f} %, partial {100 * predicted.partial_hit_rate:.0f} %, "
        f"{format_bytes(predicted.link_bytes)} over the link in {1e3 * predicted.link_s:.2f} ms, of which "
        f"{1e3 * predicted.covered_s:.2f} are hidden and {1e3 * predicted.wasted_s:.2f} spent on wrong guesses"
    ]


def _curve(curve: Sequence[tuple[int, Breakdown]]) -> list[str]:
    return [f"{format_bytes(budget):>12}  {1 / cost.total_s:8.1f} tokens/s" for budget, cost in curve]
