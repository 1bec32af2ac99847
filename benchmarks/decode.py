"""Decoding speed, batch 1: MoEpic at several budgets and strategies, and Transformers' own expert implementations.

`python -m benchmarks.decode CHECKPOINT [--device cpu|cuda] [--link …] [--vram 25% 50% 100%] [--strategies …]
[--transformers eager grouped_mm …] [--rounds 5]`. Greedy, 32 prompt tokens, 64 new ones, from the second token on. All
variants live in one process and take turns; one loaded engine changes its budget between them, and each turn begins
with a reply that is not counted, so that caches are warm. The floor beside each figure is what the bytes alone would
take: max(missing bytes / link, used bytes / memory bandwidth). `link_share` is the part of the link's rate that
decoding used. An emulated link has the rate of its name, disk, bus and memory are measured in the run. Every row has
medians, and under `range` the least and most of the rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from benchmarks.common import checkpoint_name, report, spread, take_turns
from benchmarks.figures import NEW_TOKENS, PROMPT_TOKENS, Figures, against_floor, prompt_ids, reply_figures
from benchmarks.raw_rates import bus_bytes_per_s, disk_bytes_per_s, memory_bytes_per_s
from benchmarks.rival_transformers import greedy
from moepic_core.disk_store import DiskStore
from moepic_core.engine import Engine
from moepic_core.spec import STRATEGIES, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--link", default="auto")
    parser.add_argument("--vram", nargs="*", default=["100%"], help="budgets; 100%% holds everything")
    parser.add_argument("--split", type=float, default=None)
    parser.add_argument("--strategies", nargs="*", default=["moepic"], choices=list(STRATEGIES))
    parser.add_argument("--transformers", nargs="*", default=[], help="eager, grouped_mm, batched_mm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packed-dir", default=None)
    options = parser.parse_args()

    settings = Settings(
        options.checkpoint, device=options.device, link=options.link, vram=options.vram[-1], split=options.split,
        context_length=256, packed_dir=options.packed_dir,
    )  # fmt: skip
    with Engine.load(settings) as engine:
        prompt = prompt_ids(engine.spec.vocab_size)
        memory_rate = memory_bytes_per_s(engine.hf.device)
        variants: dict[str, Callable[[], Figures]] = {}
        for strategy in options.strategies:
            for vram in options.vram:
                variants[f"{strategy} {vram}"] = _ours(engine, strategy, vram, prompt, memory_rate)
        names = [f"transformers {name}" for name in options.transformers]
        for name, implementation in zip(names, options.transformers, strict=True):
            variants[name] = _theirs(options.checkpoint, implementation, prompt, engine)
        for measure in variants.values():
            measure()  # warms up
        turns = take_turns(variants, options.rounds)
        rows = [_row(name, turns.rounds, names) for name in variants]
        for row in rows:
            print(_line(row))
        report("decode", {
            "checkpoint": checkpoint_name(options.checkpoint), "device": engine.machine.device_name,
            "link": engine.link.label, "weights": "random (routing is almost uniform)",
            "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "memory_bytes_per_s": memory_rate,
            "rounds": options.rounds, "rounds_disturbed": turns.num_disturbed,
            "disturbed_rounds_kept": turns.all_kept, "rows": rows,
        })  # fmt: skip


def _ours(engine: Engine, strategy: str, vram: str, prompt: list[int], memory_rate: float) -> Callable[[], Figures]:
    def measure() -> Figures:
        engine.reconfigure(strategy=strategy, vram=vram)
        for _ in range(2):
            figures = reply_figures(engine, prompt, NEW_TOKENS)
        rate = _link_bytes_per_s(engine)
        return figures | against_floor(figures, rate, memory_rate)

    return measure


def _link_bytes_per_s(engine: Engine) -> float:
    """What the engine's link can carry: by its name, or measured now."""
    if engine.link.bytes_per_s is not None:
        return engine.link.bytes_per_s
    store = engine.residency.store
    return disk_bytes_per_s(store.path) if isinstance(store, DiskStore) else bus_bytes_per_s(engine.hf.device)


def _theirs(checkpoint: str, implementation: str, prompt: list[int], engine: Engine) -> Callable[[], Figures]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, engine.spec.dtype), experts_implementation=implementation
    )
    model = model.to(engine.hf.device).eval()

    def measure() -> Figures:
        start_s = time.perf_counter()
        times = [time.perf_counter() for _ in islice(greedy(model, prompt), NEW_TOKENS)]
        tpot_s = (times[-1] - times[0]) / (NEW_TOKENS - 1)
        return {"tpot_s": tpot_s, "tokens_per_s": 1 / tpot_s, "ttft_s": times[0] - start_s}

    return measure


def _row(name: str, rounds: list[dict[str, Figures]], rivals: list[str]) -> dict[str, Any]:
    """Medians of a variant over rounds, with their least and most; against the fastest rival of the same round."""
    own = [results[name] for results in rounds]
    if rivals and name not in rivals:
        for figures, results in zip(own, rounds, strict=True):
            figures["times_best_rival"] = min(results[each]["tpot_s"] for each in rivals) / figures["tpot_s"]
    spreads = {key: spread(figures[key] for figures in own) for key in own[0]}
    medians = {key: each["median"] for key, each in spreads.items()}
    return {"variant": name, **medians, "range": {key: (each["min"], each["max"]) for key, each in spreads.items()}}


def _line(row: dict[str, Any]) -> str:
    line = f"{row['variant']:28} {row['tokens_per_s']:7.2f} tokens/s"
    line += "  ({:.1f}–{:.1f} ms)".format(*(1e3 * each for each in row["range"]["tpot_s"]))
    if "floor_s" in row:
        line += f"  hits {row['hit_rate']:.0%} partial {row['partial_hit_rate']:.0%}"
        line += f"  {row['bytes_per_token'] / 1e6:.0f} MB/token"
        line += f"  {row['link_share']:.0%} of the link  {row['times_floor']:.2f} × floor"
    if "times_best_rival" in row:
        line += f"  {row['times_best_rival']:.2f} × best rival"
    return line


if __name__ == "__main__":
    main()
