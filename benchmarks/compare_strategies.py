"""The paper's comparison on the live engine: every strategy at five cache sizes and three speeds of an emulated link.

`python -m benchmarks.compare_strategies [CHECKPOINT]`. Link speeds are such that loading all experts of a token
takes 1, 2.9 (the paper's machine) and 6 times what computing the token takes. A cell starts with empty caches and the
routing of an earlier session, plays a few replies to warm up and then the measured ones; all cells are played in turn,
several rounds. The cells of one cache size begin with a calibration. Beside what was measured stand what the plan had
promised from the routing of before, and for the very tokens that were played the cost model's prediction and the
simulator's replay, all by those costs. Emulated link; times hold for this machine, ratios travel. `benchmarks.tables`
makes tables of the last line, which is one JSON object, `benchmarks.draw` pictures.

One thread computes, so that the link's copies have a core of their own, as they have a copy engine on a GPU.
`benchmarks.reference_checkpoints` makes two checkpoints for this: `wide` with the bundled model's routing and experts
of the size that real models have, `even` with Mixtral's proportions and an even use of experts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ForeignLoad, report
from benchmarks.tables import margins
from moepic_core.calibration import calibrate
from moepic_core.cost_model import predict
from moepic_core.costs import Costs
from moepic_core.engine import Engine
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.measuring import aside, start_over
from moepic_core.routing import RoutingTrace, joined
from moepic_core.simulator import simulate
from moepic_core.spec import STRATEGIES, Plan, Settings
from moepic_core.trace import Outcome, TracePhase, decoded
from moepic_core.trace_file import load_trace
from moepic_core.workload import replay, workload

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHARES = (1 / 6, 1 / 3, 1 / 2, 5 / 8, 4 / 5)  # of all experts' bytes
RATIOS = (1.0, 2.9, 6.0)
NUM_EARLIER = 16  # questions of the earlier session
ABLATIONS: dict[str, dict[str, Any]] = {
    "moepic, no split": {"strategy": "moepic", "split": 1.0},
    "moepic, no prefetch": {"strategy": "moepic", "prefetch": "off"},
    "moepic, the paper's LCP": {"strategy": "moepic", "eviction": "lcp"},
    "moepic, ageing LCP": {"strategy": "moepic", "eviction": "lcp-aged"},
    "moepic, LRU": {"strategy": "moepic", "eviction": "lru"},
    "moepic, all halves": {"strategy": "moepic", "split": 0.5},
    "moepic, equal shares of halves": {"strategy": "mixtral-offloading", "split": 0.5, "eviction": "lcp-aged"},
}


@dataclass
class Cell:
    """One strategy under one budget and link."""

    variant: str
    share: float
    ratio: float
    plan: Plan | None = None
    tpot_s: list[float] = field(default_factory=list)  # one per round, as the three below
    planned_s: list[float] = field(default_factory=list)
    predicted_s: list[float] = field(default_factory=list)
    simulated_s: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(ASSETS / "demo-moe"))
    parser.add_argument("--trace", type=Path, help="routing of an earlier session; without, one is played first")
    parser.add_argument("--questions", type=Path, default=ASSETS / "demo_recipe" / "unseen.toml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replies", type=int, default=4, help="measured ones; as many warm up")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--temperature", type=float, default=0.0, help="1 for random weights, which repeat themselves")
    parser.add_argument("--threads", type=int, default=1, help="of computation")
    parser.add_argument("--compute-ms", type=float, help="of a token, that sets the links; measured first if not given")
    parser.add_argument("--ablations", action="store_true", help="parts of moepic switched off, in place of strategies")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    earlier = load_trace(options.trace) if options.trace else None
    questions = [entry["ask"] for entry in tomllib.loads(options.questions.read_text(encoding="utf-8"))["question"]]
    variants = ABLATIONS | {"moepic": {"strategy": "moepic"}} if options.ablations else {
        name: {"strategy": name} for name in STRATEGIES
    }  # fmt: skip
    compute_s, active_bytes = compute_of_token(options.checkpoint)
    measured_s, compute_s = compute_s, compute_s if options.compute_ms is None else options.compute_ms / 1e3
    cells: list[Cell] = []
    disturbed = 0
    for ratio in options.ratios:
        rate = active_bytes / (ratio * compute_s)
        found, odd = measure(options, variants, ratio, rate, earlier, questions)
        cells += found
        disturbed += odd
    rows = [row(cell) for cell in cells]
    print(table(rows), file=sys.stderr)
    report("compare_strategies", {
        "emulated_link": True, "checkpoint": Path(options.checkpoint).name, "resident_s_per_token": measured_s,
        "compute_s_per_token": compute_s,
        "active_bytes_per_token": active_bytes, "disturbed_cells": disturbed, "rounds": options.rounds,
        "margins": margins(rows), "rows": rows,
    })  # fmt: skip
    return 0


def compute_of_token(checkpoint: str) -> tuple[float, int]:
    """Seconds that a token takes when everything is resident, and the bytes of the experts that it uses."""
    settings = Settings.create(checkpoint=checkpoint, device="cpu", link="emulated:50GB/s", vram="100%", prefetch="off")
    with Engine.load(settings) as engine:
        for _ in range(3):  # until every expert has come once
            list(engine.generate("Count: one, two, three.", Sampling(max_new_tokens=64, ignore_eos=True)))
        reply = engine.snapshot().reply
        assert reply is not None and reply.tpot_s is not None
        nbytes = sum(engine.spec.top_k * layer.expert_bytes for layer in engine.spec.moe_layers)
        return reply.tpot_s, nbytes


def measure(
    options: argparse.Namespace,
    variants: dict[str, dict[str, Any]],
    ratio: float,
    rate: float,
    earlier: RoutingTrace | None,
    questions: Sequence[str],
) -> tuple[list[Cell], int]:
    """All cells over one link, and the number of cells during which another process was busy."""
    settings = Settings.create(
        checkpoint=options.checkpoint,
        device="cpu",
        link=f"emulated:{rate / 1e6:.3f}MB/s",
        context_length=512,
        prefill_chunk=64,
    )
    of_shares = [[Cell(name, share, ratio) for name in variants] for share in options.shares]
    disturbed = 0
    with Engine.load(settings) as engine:
        if earlier is None:
            engine.reconfigure(strategy="pregated")  # where all is resident nothing would be guessed
            for number, question in enumerate(questions[-NUM_EARLIER:]):
                ask(engine, question, options, number)
            earlier = engine.steering.trace()
            assert earlier is not None
        engine.steering.earlier = earlier
        for number in range(options.rounds):
            way = 1 if number % 2 == 0 else -1  # there and back: a slow drift of the machine meets all alike
            for cells in of_shares[::way]:
                costs = calibrate(engine)
                print(f"ratio {ratio}, round {number + 1}: {rate / 1e6:.0f} MB/s, costs {costs}", file=sys.stderr)
                for cell in cells[::way]:
                    load = ForeignLoad()
                    with aside(engine):  # costs and statistics stay as they are, so all cells stand on the same
                        play(engine, cell, variants[cell.variant], options, costs, earlier, questions)
                    disturbed += load.cores() > 0.5
    return list(chain.from_iterable(of_shares)), disturbed


def play(
    engine: Engine, cell: Cell, changes: dict[str, Any], options: argparse.Namespace, costs: Costs,
    earlier: RoutingTrace, questions: Sequence[str],
) -> None:  # fmt: skip
    """One round of one cell."""
    experts = sum(layer.layer_bytes for layer in engine.spec.moe_layers)
    budget = engine.needs.fixed + engine.needs.staging_records * engine.needs.record + int(cell.share * experts)
    defaults = {"split": None, "eviction": "auto", "prefetch": "auto"}
    cell.plan = plan = engine.reconfigure(vram=budget, **{**defaults, **changes})
    start_over(engine, earlier)
    engine.hf.forget()
    first = None
    seconds, tokens = 0.0, 0
    totals = None
    for number in range(2 * options.replies):
        question = questions[(7 * number) % len(questions)]
        ask(engine, question, options, number)
        snapshot = engine.snapshot()
        reply = snapshot.reply
        assert reply is not None and reply.tpot_s is not None
        first = reply.number if first is None else first
        if number >= options.replies:
            seconds += reply.tpot_s * (reply.new_tokens - 1)
            tokens += reply.new_tokens - 1
            totals = snapshot.last_reply.decode if totals is None else totals + snapshot.last_reply.decode
    assert totals is not None and first is not None
    cell.tpot_s.append(seconds / tokens)
    figures = totals.total
    num_experts = [layer.num_experts for layer in engine.spec.moe_layers]
    played = decoded(engine.residency.telemetry.trace(), num_experts, "this run", {}).last(2 * tokens)
    assert engine.plan is plan, "the plan changed while a cell was played"
    layers, warm_up = engine.spec.moe_layers, played.num_tokens - tokens
    assert plan.predicted is not None, plan.reason
    predicted = predict(plan, layers, costs, played, warm_up=warm_up, earlier=earlier)
    replayed = simulate(played, plan, costs, layers, warm_up=warm_up, earlier=earlier)
    cell.planned_s.append(plan.predicted.total_s)
    cell.predicted_s.append(predicted.total_s)
    cell.simulated_s.append(replayed.tpot_s)
    cell.facts = {
        "hit_rate": figures.hit_rate, "partial_hit_rate": figures.partial_hit_rate, "miss_rate": figures.miss_rate,
        "foreseen": foreseen(engine, plan, tokens),
        "expected_foreseen": expected_foreseen(plan, played, warm_up, earlier),
        "stall_s": figures.stall_s / tokens, "link_busy_s": figures.link_busy_s / tokens,
        "overlap": figures.overlap, "bytes_per_token": (figures.demand_bytes + figures.prefetch_bytes) / tokens,
        "simulated_hit_rate": replayed.breakdown.hit_rate, "simulated_miss_rate": replayed.breakdown.miss_rate,
        "budget_bytes": budget,
    }  # fmt: skip


def foreseen(engine: Engine, plan: Plan, tokens: int) -> float:
    """Of what the last `tokens` used, the share that was cached, at least its top, or had been guessed in time or not.

    Unlike hits it does not hang on whether a transfer ends a microsecond before or behind the router's answer.
    """
    rows = engine.residency.telemetry.trace().routing
    rows = rows[rows["phase"] == TracePhase.DECODE][-tokens * len(plan.layers) :]
    guessed = (rows["experts"][:, :, None] == rows["guesses"][:, None, : plan.prefetch_depth]).any(axis=2)
    return float((guessed | (rows["outcomes"] != Outcome.MISS))[rows["counts"] > 0].mean())


def expected_foreseen(plan: Plan, played: RoutingTrace, warm_up: int, earlier: RoutingTrace) -> float:
    """The same by the cost model's reading of the trace."""
    known = joined(earlier, played)
    depth = plan.prefetch_depth if plan.predictor != "none" else 0
    start = earlier.num_tokens + warm_up
    work = workload(replay(known, plan.eviction, plan.predictor), depth, start=start)
    found = [each.found(np.array([share.slots])) for each, share in zip(work.layers, plan.layers, strict=True)]
    uses = sum(each.uses.sum() for each in work.layers)
    return float(sum((each.hits + each.guessed_misses).sum() for each in found) / uses)


def ask(engine: Engine, question: str, options: argparse.Namespace, seed: int) -> None:
    sampling = Sampling(
        max_new_tokens=options.new_tokens, ignore_eos=True, temperature=options.temperature, seed=seed
    )  # fmt: skip
    *_, done = engine.generate([{"role": "user", "content": question}], sampling)
    assert isinstance(done, Done)


def row(cell: Cell) -> dict[str, Any]:
    return {
        "strategy": cell.variant, "share": round(cell.share, 4), "ratio": cell.ratio,
        "tpot_s": statistics.median(cell.tpot_s), "tpot_s_min": min(cell.tpot_s), "tpot_s_max": max(cell.tpot_s),
        "planned_s": statistics.median(cell.planned_s), "planned_over_measured": over(cell.planned_s, cell.tpot_s),
        "predicted_s": statistics.median(cell.predicted_s), "simulated_s": statistics.median(cell.simulated_s),
        "predicted_over_measured": over(cell.predicted_s, cell.tpot_s),
        "simulated_over_measured": over(cell.simulated_s, cell.tpot_s),
        **cell.facts,
    }  # fmt: skip


def over(expected_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """The median over the rounds, each by its own costs."""
    return statistics.median(one / other for one, other in zip(expected_s, measured_s, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'link':>6}{'cached':>8}  {'strategy':22}{'ms':>8}{'hit':>6}{'part':>6}{'miss':>6}{'ovl':>6}"
        f"{'plan':>8}{'pred':>8}{'sim':>8}"
    ]
    for r in rows:
        overlap = "–" if r["overlap"] is None else f"{100 * r['overlap']:.0f}"
        lines.append(
            f"{r['ratio']:6g}{100 * r['share']:7.1f}%  {r['strategy']:22}{1e3 * r['tpot_s']:8.1f}"
            f"{100 * r['hit_rate']:6.0f}{100 * r['partial_hit_rate']:6.0f}{100 * r['miss_rate']:6.0f}{overlap:>6}"
            f"{1e3 * r['planned_s']:8.1f}{1e3 * r['predicted_s']:8.1f}{1e3 * r['simulated_s']:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    started = time.time()
    code = main()
    print(f"{time.time() - started:.0f} s", file=sys.stderr)
    raise SystemExit(code)
