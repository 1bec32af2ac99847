"""Decoding speed, batch 1: MoEpic at several budgets and strategies, and Transformers' own expert implementations.

`python -m benchmarks.decode CHECKPOINT [--device cpu|cuda] [--link …] [--vram 25% 50% 100%] [--strategies …]
[--transformers eager grouped_mm …] [--rounds 5]`. Greedy, 32 prompt tokens, 64 new ones, from the second token on. All
variants live in one process and take turns; one loaded engine changes its budget between them, and each turn begins
with a reply that is not counted, so that caches are warm. The floor beside each figure is what the bytes alone would
take: max(missing bytes / link, resident bytes / memory bandwidth), both bandwidths measured in the same run. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common import interleave, report
from moepic_core.engine import Engine
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings

PROMPT_TOKENS, NEW_TOKENS = 32, 64


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
        prompt = [(7919 * place) % engine.spec.vocab_size for place in range(1, PROMPT_TOKENS + 1)]
        figures: dict[str, list[dict[str, float]]] = {}
        variants: dict[str, Callable[[], float]] = {}
        for strategy in options.strategies:
            for vram in options.vram:
                variants[f"{strategy} {vram}"] = _ours(engine, strategy, vram, prompt, figures)
        for name in options.transformers:
            variants[f"transformers {name}"] = _theirs(options.checkpoint, name, prompt, engine)
        rounds = interleave(variants, options.rounds)
        bandwidth = _memory_bytes_per_s(engine.hf.device)
        rows = []
        for name in variants:
            low, high = rounds.spread(name)
            row: dict[str, Any] = {"variant": name, "tpot_s": rounds.median(name), "min_s": low, "max_s": high}
            row["tokens_per_s"] = 1 / row["tpot_s"]
            if name in figures:
                row |= {key: statistics.median(each[key] for each in figures[name]) for key in figures[name][0]}
                row["floor_s"] = _floor(engine, row, bandwidth)
                row["times_floor"] = row["tpot_s"] / row["floor_s"]
            rows.append(row)
            print(_line(row))
        report("decode", {
            "checkpoint": engine.spec.name, "device": engine.machine.device_name, "link": engine.link.label,
            "weights": "random (routing is almost uniform)", "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
            "memory_bytes_per_s": bandwidth, "rounds": options.rounds, "rounds_disturbed": rounds.num_disturbed,
            "disturbed_rounds_kept": rounds.all_kept, "rows": rows,
        })  # fmt: skip


def _ours(
    engine: Engine, strategy: str, vram: str, prompt: list[int], figures: dict[str, list[dict[str, float]]]
) -> Callable[[], float]:
    name = f"{strategy} {vram}"

    def measure() -> float:
        engine.reconfigure(strategy=strategy, vram=vram)
        for _ in range(2):
            engine.hf.forget()
            for _ in engine.generate(prompt, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)):
                pass
        snapshot = engine.snapshot()
        assert snapshot.reply is not None
        assert snapshot.reply.tpot_s is not None
        decode = snapshot.last_reply.decode.total
        figures.setdefault(name, []).append({
            "ttft_s": snapshot.reply.ttft_s or 0.0,
            "hit_rate": decode.hit_rate or 0.0,
            "partial_hit_rate": decode.partial_hit_rate or 0.0,
            "miss_rate": decode.miss_rate or 0.0,
            "bytes_per_token": (decode.demand_bytes + decode.prefetch_bytes) / (NEW_TOKENS - 1),
            "link_bytes_per_s": (decode.demand_bytes + decode.prefetch_bytes) / max(decode.link_busy_s, 1e-9),
            "stall_s_per_token": decode.stall_s / (NEW_TOKENS - 1),
            "overlap": 1.0 if decode.overlap is None else decode.overlap,
        })  # fmt: skip
        return snapshot.reply.tpot_s

    return measure


def _theirs(checkpoint: str, implementation: str, prompt: list[int], engine: Engine) -> Callable[[], float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, engine.spec.dtype), experts_implementation=implementation
    )
    model = model.to(engine.hf.device).eval()

    def measure() -> float:
        times = [time.perf_counter() for _ in _greedy(model, prompt, engine.hf.device)]
        return (times[-1] - times[0]) / (len(times) - 1)

    return measure


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int], device: torch.device) -> Iterator[int]:
    output = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
    for _ in range(NEW_TOKENS):
        token = int(output.logits[0, -1].argmax())
        yield token
        output = model(torch.tensor([[token]], device=device), past_key_values=output.past_key_values, use_cache=True)


def _floor(engine: Engine, row: dict[str, Any], bandwidth: float) -> float:
    """Seconds per token that the bytes alone take. Missing bytes need the link, all used bytes the device's memory."""
    spec = engine.spec
    used = engine.needs.resident + spec.top_k * sum(layer.expert_bytes for layer in spec.moe_layers)
    link = engine.link.bytes_per_s or row["link_bytes_per_s"]
    return max(row["bytes_per_token"] / link, used / bandwidth)


def _memory_bytes_per_s(device: torch.device) -> float:
    """Reading bandwidth of the device's memory: the best of ten sums over 1 GB."""
    data = torch.ones(1 << 28, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        data.sum().item()
        best = max(best, data.numel() * 4 / (time.perf_counter() - start))
    return best


def _line(row: dict[str, Any]) -> str:
    line = f"{row['variant']:28} {row['tokens_per_s']:7.2f} tokens/s"
    line += f"  ({row['min_s'] * 1e3:.1f}–{row['max_s'] * 1e3:.1f} ms)"
    if "floor_s" in row:
        line += f"  hits {row['hit_rate']:.0%} partial {row['partial_hit_rate']:.0%}"
        line += f"  {row['bytes_per_token'] / 1e6:.0f} MB/token"
        line += f"  link {row['link_bytes_per_s'] / 1e9:.2f} GB/s  {row['times_floor']:.2f} × floor"
    return line


if __name__ == "__main__":
    main()
