"""One reply in figures, and how far it is from what its bytes alone would take. For `decode` and `capped_decode`.

Imports nothing but the engine, because under a memory cap every module counts.
"""

from __future__ import annotations

from moepic_core.engine import Engine
from moepic_core.hf.text import Sampling

PROMPT_TOKENS, NEW_TOKENS = 32, 64
Figures = dict[str, float]


def prompt_ids(vocab_size: int) -> list[int]:
    return [(7919 * place) % vocab_size for place in range(1, PROMPT_TOKENS + 1)]


def reply_figures(engine: Engine, prompt: list[int], num_tokens: int) -> Figures:
    """One reply of `num_tokens`. Of decoding, bytes and seconds per token."""
    engine.hf.forget()
    for _ in engine.generate(prompt, Sampling(max_new_tokens=num_tokens, ignore_eos=True)):
        pass
    snapshot = engine.snapshot()
    reply, decode = snapshot.reply, snapshot.last_reply.decode.total
    assert reply is not None
    assert reply.tpot_s is not None
    moved, passes = decode.demand_bytes + decode.prefetch_bytes, num_tokens - 1
    layers = engine.spec.moe_layers
    return {
        "tpot_s": reply.tpot_s,
        "tokens_per_s": 1 / reply.tpot_s,
        "ttft_s": reply.ttft_s or 0.0,
        "hit_rate": decode.hit_rate or 0.0,
        "partial_hit_rate": decode.partial_hit_rate or 0.0,
        "miss_rate": decode.miss_rate or 0.0,
        "bytes_per_token": moved / passes,
        "needed_bytes_per_token": (moved - decode.prefetch_wasted_bytes) / passes,
        "used_bytes_per_token": engine.needs.resident + engine.spec.top_k * sum(each.expert_bytes for each in layers),
        "link_busy_bytes_per_s": moved / max(decode.link_busy_s, 1e-9),
        "stall_s_per_token": decode.stall_s / passes,
        "overlap": 1.0 if decode.overlap is None else decode.overlap,
    }


def against_floor(figures: Figures, link_rate: float, memory_rate: float) -> Figures:
    """Seconds per token that the bytes alone take, and what part of the link's rate was used. Bytes that were missing
    need the link, all that were used the device's memory; guesses that came for nothing count for the share alone.
    """
    floor_s = max(figures["needed_bytes_per_token"] / link_rate, figures["used_bytes_per_token"] / memory_rate)
    return {
        "link_bytes_per_s": link_rate,
        "link_share": figures["bytes_per_token"] / figures["tpot_s"] / link_rate,
        "floor_s": floor_s,
        "times_floor": figures["tpot_s"] / floor_s,
    }
