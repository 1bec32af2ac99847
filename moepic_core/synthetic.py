"""Made-up routing traces for models that nobody has recorded here: popularity, locality, subjects, guesses as stated.

Whoever simulates a preset takes `trace_for(model, tokens)`, and shows its `source`, which begins with "synthetic".
This is a model of routing (ours), no router: the experts of a token are drawn without replacement, each by the
popularity that the current subject gives it or, with a stated probability, by how much recent tokens used it.
The same seed gives the same trace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import BadSettings
from .hit_curves import hit_curve, ranks
from .presets import Model
from .routing import RoutingTrace

RANK_FALL = 0.1  # how much more often the first guess for a layer is right than the last


@dataclass(frozen=True)
class Habits:
    """How a model routes a user's text. Everything but accuracy is the same in all layers."""

    popularity: float  # Zipf's exponent: within a subject the n-th expert has weight n ** -popularity
    locality: float  # 0..1, probability that an expert is drawn from what recent tokens used
    memory_tokens: float  # after which a use counts 1/e of a fresh one in "recent"
    subject_share: float  # 0..1, how much of an expert's popularity is due to the subject, not to the model
    subject_tokens: int  # until the next subject
    num_subjects: int  # in rotation
    reply_tokens: int
    middle_accuracy: float  # share of right guesses for the middle layer, falling towards both ends
    end_accuracy: float


# Popularity, memory and subjects were chosen, and locality fitted, so that Qwen1.5-MoE with 30 of 60 experts cached
# hits as published (arXiv 2509.08342: LRU 56.4 %, LFU 60.7 %, LCP 62.2 %; here 56.6, 62.1 and 62.2). For the others no
# such figures are known to us: they are assumed to route alike, but for Mixtral, whose experts are used about evenly
# and often again by the next token (arXiv 2401.04088). 79 % of the guesses are right: arXiv 2511.10676 puts guesses
# from the layer before about 15 points below its own 93 and 95 % (DeepSeek-V2-Lite, Qwen3-30B); assumed for all.
_LIKE_QWEN = Habits(0.45, 0.6, 256, 0.5, 512, 8, 256, middle_accuracy=0.93, end_accuracy=0.55)
HABITS: dict[str, Habits] = {
    "mixtral-8x7b": replace(_LIKE_QWEN, popularity=0.2, locality=0.25, memory_tokens=2),
    "qwen1.5-moe-a2.7b": _LIKE_QWEN,
    "qwen3-30b-a3b": _LIKE_QWEN,
    "gpt-oss-20b": _LIKE_QWEN,
    "gpt-oss-120b": _LIKE_QWEN,
    "deepseek-v2-lite": _LIKE_QWEN,
}


def trace_for(model: Model, tokens: int, seed: int = 0) -> RoutingTrace:
    """A trace of a preset model under its habits."""
    habits = HABITS[model.name]
    return synthesize(habits, model.num_moe_layers, model.num_experts, model.top_k, tokens, seed, model.title)


def synthesize(
    habits: Habits, num_layers: int, num_experts: int, top_k: int, tokens: int, seed: int = 0, name: str = "a model"
) -> RoutingTrace:
    """A trace of `tokens` decoded tokens, with top_k guesses for each layer of each token.

    A wrong guess is one of the next best experts, as a router's would be. Raises BadSettings unless each layer has at
    least twice as many experts as a token uses.
    """
    if num_experts < 2 * top_k:
        raise BadSettings(f"a synthetic trace needs {2 * top_k} experts for top-{top_k}, got {num_experts}; use more")
    generator = np.random.default_rng(seed)
    popularity = _popularity(habits, num_layers, num_experts, generator)
    accuracy = _accuracy(habits, num_layers, top_k)
    experts = np.empty((tokens, num_layers, top_k), np.int16)
    guesses = np.empty((tokens, num_layers, top_k), np.int16)
    subjects = np.arange(tokens) // habits.subject_tokens % habits.num_subjects
    recent = popularity[0].copy()
    fade = np.exp(-1 / habits.memory_tokens)
    for token, subject in enumerate(subjects):
        weights = (1 - habits.locality) * popularity[subject] + habits.locality * recent
        # The smallest of exponential variables over weights come as draws without replacement would, one by one.
        delays = generator.standard_exponential(weights.shape, np.float32) / weights
        best = delays.argpartition(2 * top_k - 1, axis=1)[:, : 2 * top_k]
        best = np.take_along_axis(best, np.take_along_axis(delays, best, 1).argsort(1), 1)
        used, next_best = best[:, :top_k], best[:, top_k:]
        experts[token] = used
        guesses[token] = np.where(generator.random(used.shape) < accuracy, used, next_best)
        recent *= fade
        np.put_along_axis(recent, used, np.take_along_axis(recent, used, 1) + (1 - fade) / top_k, 1)
    return RoutingTrace(
        experts, guesses, (num_experts,) * num_layers, np.arange(tokens, dtype=np.int32) // habits.reply_tokens,
        subjects.astype(np.int16), tuple(f"subject {number + 1}" for number in range(habits.num_subjects)),
        f"synthetic: {name}, popularity {habits.popularity:g}, locality {habits.locality:g}, seed {seed}",
    )  # fmt: skip


def hit_rate(trace: RoutingTrace, policy: str, num_slots: int) -> float:
    """Share of expert uses that a cache of `num_slots` whole experts per layer hits, under an eviction policy."""
    found = ranks(policy, trace).experts
    curves = [hit_curve(found[:, layer], count) for layer, count in enumerate(trace.num_experts)]
    return float(np.mean([curve[num_slots] for curve in curves]))


def _popularity(
    habits: Habits, num_layers: int, num_experts: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """[subjects, layers, experts], shares of one. Subjects order the experts alike or not, as subject_share says."""
    shape = (habits.num_subjects, num_layers, num_experts)
    own, common = generator.standard_normal(shape), generator.standard_normal(shape[1:])
    liking = np.sqrt(habits.subject_share) * own + np.sqrt(1 - habits.subject_share) * common
    places = (-liking).argsort(axis=2).argsort(axis=2)
    weights = (places + 1.0) ** -habits.popularity
    return np.asarray(weights / weights.sum(axis=2, keepdims=True))


def _accuracy(habits: Habits, num_layers: int, depth: int) -> NDArray[np.float64]:
    """[layers, depth], probability that a guess is right."""
    height = np.sin(np.pi * (np.arange(num_layers) + 0.5) / num_layers)
    layers = habits.end_accuracy + (habits.middle_accuracy - habits.end_accuracy) * height
    falling = RANK_FALL * (0.5 - (np.arange(depth) + 0.5) / depth)
    return np.clip(layers[:, None] + falling, 0.0, 1.0)
