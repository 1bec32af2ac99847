"""What the demonstration model can do, and how it routes: the numbers of its model card.

Answers are made by plain Transformers, greedily unless said otherwise, and checked for the phrases that a right answer
contains. Routing is read from the routers of the same model while it answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpus import DOMAINS, Corpus, Turn

BATCH = 32
LONGEST = 160  # tokens of an answer; the longest in the corpus has fewer


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[tuple[str, bool]]:
    """The model's answer to each turn, and whether it ended by itself within LONGEST tokens."""
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    by_length = sorted(range(len(turns)), key=lambda place: len(turns[place].question))
    found: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(turns), BATCH):
        places = by_length[start : start + BATCH]
        texts = [
            tokenizer.apply_chat_template(_messages(turns[i]), tokenize=False, add_generation_prompt=True)
            for i in places
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=LONGEST,
                **sampling,
            )
        for place, row in zip(places, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            found[place] = (tokenizer.decode(row, skip_special_tokens=True).strip(), tokenizer.eos_token_id in row)
    return [found[place] for place in range(len(turns))]


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seed: int = 1) -> dict[str, Any]:
    """Share of right answers to held-out questions per domain; facts and follow-ups apart. And what went wrong."""
    rng = random.Random(seed)
    shares: dict[str, float] = {}
    wrong: list[str] = []
    for domain in DOMAINS:
        turns = corpus.held_out(domain, rng)
        groups = {domain: [turn for turn in turns if turn.before is None]}
        if domain == "facts":
            groups["follow-ups"] = [turn for turn in turns if turn.before is not None]
        for name, group in groups.items():
            made = answers(model, tokenizer, group)
            right = [turn.right(answer) for turn, (answer, _) in zip(group, made, strict=True)]
            shares[name] = sum(right) / len(right)
            wrong += [
                f"{name}: {turn.question} -> {answer}"
                for turn, (answer, _), good in zip(group, made, right, strict=True)
                if not good
            ]
    return {"right": shares, "wrong": wrong}


def never_used(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seed: int = 1) -> int:
    """How many experts no token of the held-out questions and their right answers is routed to."""
    rng = random.Random(seed)
    used = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.bool)
    for domain in DOMAINS:
        for turn in corpus.held_out(domain, rng):
            messages = [*_messages(turn), {"role": "assistant", "content": turn.answer}]
            inputs = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
            with torch.inference_mode():
                routers = model(input_ids=inputs["input_ids"], output_router_logits=True).router_logits
            for layer, logits in enumerate(routers):
                used[layer, logits.topk(model.config.num_experts_per_tok).indices.unique()] = True
    return int((~used).sum())


def loops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, count: int = 200, seed: int = 2
) -> list[str]:
    """Degenerate ones among `count` answers sampled at temperature 0.7: without an end, or saying one thing thrice."""
    rng = random.Random(seed)
    pools = [corpus.held_out(domain, rng) for domain in DOMAINS]
    turns = [rng.choice(pools[number % len(pools)]) for number in range(count)]
    made = answers(model, tokenizer, turns, temperature=0.7, seed=seed)
    return [
        f"{turn.question} -> {answer}"
        for turn, (answer, ended) in zip(turns, made, strict=True)
        if not ended or repeats(answer)
    ]


def repeats(text: str) -> bool:
    """Whether some run of words stands there three times in a row."""
    return re.search(r"\b(\w[\w ,.']*?)(?:[ ,.]+\1\b){2}", text) is not None


def _messages(turn: Turn) -> list[dict[str, str]]:
    if turn.before is None:
        return [{"role": "user", "content": turn.question}]
    said = {"role": "assistant", "content": turn.before.answer}
    return [*_messages(turn.before), said, {"role": "user", "content": turn.question}]
