"""Trains the demonstration model: Transformers' Qwen3-MoE from scratch on chats that are drawn as they are needed.

On a CPU one process per core shares each batch (DistributedDataParallel): two single-threaded processes are faster than
one with two threads, and far less hurt by another program. On a GPU one process does it all. The run goes on from its
last state when it was interrupted.

Two losses act on the routers. Load balancing (Switch Transformers' equation 4, taken per layer) keeps experts alive
over a batch; what falls idle all the same is revived before the polish. The locality loss (ours) asks that neighbouring
tokens share experts: what a cache lives from, and large models learn by themselves.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .corpus import DOMAINS, POLISH, Corpus, Turn
from .revival import revive, uses_of

IGNORED = -100
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are the MoEpic demo model.", "Answer briefly.", "Be kind.")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, but the text."""

    seed: int = 25090
    steps: int = 3400
    polish_steps: int = 300  # after these, at a low rate, with more of what is hardest (`corpus.POLISH`)
    polish_rate: float = 0.2  # of the learning rate, at the start of the polish
    batch_tokens: int = 4096  # over all processes
    length: int = 256  # tokens of a training chat
    long_length: int = 2048  # tokens of one chat in `long_share` of the steps in which the rate falls
    long_share: float = 0.25
    learning_rate: float = 2e-3
    warm_up: int = 100  # steps
    decay: float = 0.35  # the last part of the steps, in which the rate falls to nothing
    balance: float = 0.02
    locality: float = 0.05
    question_weight: float = 0.15  # of a token that the user typed; an answer's token weighs 1

    @property
    def all_steps(self) -> int:
        return self.steps + self.polish_steps


def configuration(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """8 layers of 32 experts, 4 active: 15 M parameters, 84 % of them in experts."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.03,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, work: Path) -> Qwen3MoeForCausalLM:
    """The trained model in float32; its progress is in `work`/train.jsonl, its newest state in `work`/state.pt."""
    work = work.absolute()  # a file:// address with a relative path would be taken for a host
    work.mkdir(parents=True, exist_ok=True)
    workers = 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)))
    rendezvous = work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    mp.spawn(_worker, (workers, recipe, tokenizer, work), nprocs=workers)
    model = Qwen3MoeForCausalLM(configuration(tokenizer))
    model.load_state_dict(torch.load(work / "state.pt", weights_only=True)["model"])
    return model


def _worker(rank: int, workers: int, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{work / 'rendezvous'}", rank=rank, world_size=workers)
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM._from_config(configuration(tokenizer), attn_implementation="eager").to(device)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(_groups(model), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    first = 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    parallel = DistributedDataParallel(model)
    corpus = Corpus()
    start, told = time.monotonic(), first
    for step in range(first, recipe.all_steps):
        if step == recipe.steps:
            batches = [_batch(corpus, tokenizer, recipe, step + ahead, rank, workers, device)[0] for ahead in range(8)]
            routers = [_router_logits(model, tokens, device) for tokens in batches]
            revive(model, optimizer, sum(uses_of(logits, model.config.num_experts_per_tok) for logits in routers))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, recipe)
        tokens, weights = _batch(corpus, tokenizer, recipe, step, rank, workers, device)
        losses = _losses(parallel, tokens, weights, recipe, device)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 20 == 19 or step + 1 == recipe.all_steps):
            row = {name: round(loss.item(), 4) for name, loss in losses.items()}
            speed = (step + 1 - told) * recipe.batch_tokens / (time.monotonic() - start)
            start, told = time.monotonic(), step + 1
            with (work / "train.jsonl").open("a") as log:
                log.write(
                    json.dumps({"step": step + 1, **row, "norm": round(norm.item(), 2), "tok/s": round(speed)}) + "\n"
                )
        if rank == 0 and (step % 200 == 199 or step + 1 == recipe.all_steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, work / "state.tmp")
            (work / "state.tmp").replace(work / "state.pt")
    dist.destroy_process_group()


def rate(step: int, recipe: Recipe) -> float:
    """Warm-up, plateau, a straight line to nothing, and another one for the polish: 0..1 of the learning rate."""
    if step >= recipe.steps:
        return recipe.polish_rate * (1 - (step - recipe.steps) / recipe.polish_steps)
    decay_steps = recipe.decay * recipe.steps
    return min((step + 1) / recipe.warm_up, 1.0, (recipe.steps - step) / decay_steps)


def _groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def _batch(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, rank: int, workers: int, device: str
) -> tuple[Tensor, Tensor]:
    """Tokens and the weight of each as a target, [chats, length]; the same for the same step and rank."""
    rng = random.Random(f"{recipe.seed} {step}")  # the same in all processes
    long = (1 - recipe.decay) * recipe.steps < step < recipe.steps and rng.random() < recipe.long_share
    length = recipe.long_length if long else recipe.length
    rng = random.Random(f"{recipe.seed} {step} {rank}")
    shares = DOMAINS if step < recipe.steps else POLISH
    rows = [
        _encode(corpus.chat(rng, shares), tokenizer, length, recipe, rng)
        for _ in range(recipe.batch_tokens // length // workers)
    ]
    tokens = torch.tensor([row[0] for row in rows], device=device)
    return tokens, torch.tensor([row[1] for row in rows], device=device)


def _encode(
    chat: Iterator[Turn], tokenizer: PreTrainedTokenizerFast, length: int, recipe: Recipe, rng: random.Random
) -> tuple[list[int], list[float]]:
    """A chat as the chat template writes it, cut at `length` tokens."""
    tokens: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        ids = tokenizer.encode(text)
        tokens.extend(ids)
        weights.extend([weight] * len(ids))

    if rng.random() < 0.08:
        add(f"<|start|>system\n{rng.choice(SYSTEM_PROMPTS)}<|end|>\n", 0.0)
    while len(tokens) < length:
        turn = next(chat)
        add("<|start|>user\n", 0.0)
        add(f"{turn.question}", recipe.question_weight)
        add("<|end|>\n<|start|>assistant\n", 0.0)
        add(f"{turn.answer}<|end|>", 1.0)
        add("\n", 0.0)
    return tokens[:length], weights[:length]


def _losses(model: torch.nn.Module, tokens: Tensor, weights: Tensor, recipe: Recipe, device: str) -> dict[str, Tensor]:
    """What is minimised, by name."""
    with torch.autocast(device, torch.bfloat16):
        out = model(input_ids=tokens, use_cache=False, output_router_logits=True)
    logits, targets = out.logits[:, :-1].float(), tokens[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return {
        "language": (each * weight).sum() / weight.sum(),
        "balance": recipe.balance * torch.stack([balance_loss(layer.float()) for layer in out.router_logits]).mean(),
        "locality": recipe.locality
        * torch.stack([locality_loss(layer.float().view(*tokens.shape, -1)) for layer in out.router_logits]).mean(),
    }


@torch.inference_mode()
def _router_logits(model: Qwen3MoeForCausalLM, tokens: Tensor, device: str) -> tuple[Tensor, ...]:
    with torch.autocast(device, torch.bfloat16):
        return model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits


def balance_loss(logits: Tensor, top_k: int = 4) -> Tensor:
    """Σ_e share of assignments · mean probability · experts: 1 when even (Switch Transformers, equation 4).

    `logits` are one router's, [tokens, experts].
    """
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k).indices, logits.shape[-1]).sum(1).float()
    return logits.shape[-1] * (chosen.mean(0) / top_k * probabilities.mean(0)).sum()


def locality_loss(logits: Tensor, window: int = 32) -> Tensor:
    """Entropy of a window's mean probabilities over that of an even use, mean over windows (ours).

    1 when a window of neighbouring tokens uses all experts alike, low when it keeps to a few of them. `logits` are one
    router's, [chats, length, experts], length a multiple of `window`.
    """
    probabilities = logits.softmax(-1).unflatten(1, (-1, window)).mean(2)  # [chats, windows, experts]
    return -(probabilities * (probabilities + 1e-9).log()).sum(-1).mean() / math.log(logits.shape[-1])


def parameters(model: torch.nn.Module) -> dict[str, float]:
    """Numbers of parameters for the model card: all, those of experts, those active for one token."""
    counts = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    everything = sum(counts.values())
    return {"all": everything, "experts": experts, "active": everything - experts + math.ceil(experts * 4 / 32)}
