"""On a CUDA device: the same answers, the same books, and memory that stays under the budget. Skipped without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moepic_core.arena import Arena
from moepic_core.engine import Engine
from moepic_core.events import Done, TokenMade
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings
from moepic_core.transfer.pinning import Pinned

pytestmark = pytest.mark.gpu
MIB = 1 << 20
PROMPT = [3 + (29 * place + place * place) % 300 for place in range(20)]


def load(folder: Path, **settings: object) -> Engine:
    return Engine.load(
        Settings.create(checkpoint=str(folder), device="cuda", context_length=96, prefill_chunk=7, **settings)
    )


def test_rows_of_the_token_embedding_come_from_the_host_without_waiting(checkpoints: Callable[..., Path]) -> None:
    table = load_file(checkpoints("qwen3_moe") / "model.safetensors")["model.embed_tokens.weight"]
    with load(checkpoints("qwen3_moe")) as engine:
        embedding = engine.hf.embedding
        assert embedding is not None
        tokens = torch.tensor([PROMPT], device="cuda")
        embedding.expect(tokens, PROMPT)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rows = embedding(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert rows.device.type == "cuda"
        assert torch.equal(rows.cpu()[0], table[PROMPT])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_parity_with_eager_for_every_split_and_strategy(family: str, checkpoints: Callable[..., Path]) -> None:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(checkpoints(family), experts_implementation="eager").cuda().eval()
        expected = model(torch.tensor([PROMPT], device="cuda")).logits[0]
    answers = set()
    with load(checkpoints(family)) as engine:
        budgets = (
            engine.needs.smallest,
            (engine.needs.smallest + engine.needs.everything) // 2,
            engine.needs.everything,
        )
        for changes in [{"split": split} for split in (0.0, 0.3, 1.0)] + [
            {"strategy": name, "split": None} for name in STRATEGIES
        ]:
            for vram in budgets:
                engine.reconfigure(vram=vram, **changes)
                engine.hf.forget()
                engine.residency.begin_pass(len(PROMPT))
                logits = engine.hf.forward(PROMPT, all_logits=True)
                engine.residency.end_pass()
                assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
                engine.hf.forget()
                done = list(engine.generate(PROMPT, Sampling(max_new_tokens=24, ignore_eos=True)))[-1]
                assert isinstance(done, Done)
                answers.add(done.token_ids)
                engine.check()
    assert len(answers) == 1


def test_a_budget_that_moves_mid_generation(checkpoints: Callable[..., Path]) -> None:
    with load(checkpoints("qwen3_moe"), split=0.5) as engine:
        expected = list(engine.generate(PROMPT, Sampling(max_new_tokens=40, ignore_eos=True)))[-1]
        engine.hf.forget()
        made = []
        budgets = (engine.needs.smallest, engine.needs.everything)
        for event in engine.generate(PROMPT, Sampling(max_new_tokens=40, ignore_eos=True)):
            if isinstance(event, TokenMade):
                made.append(event.token_id)
                engine.reconfigure(vram=budgets[len(made) % 2])
                engine.check()
    assert isinstance(expected, Done)
    assert tuple(made) == expected.token_ids


def reply(engine: Engine, max_new_tokens: int = 40) -> tuple[int, ...]:
    engine.hf.forget()
    done = list(engine.generate(PROMPT, Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)))[-1]
    assert isinstance(done, Done)
    return done.token_ids


def test_device_memory_stays_under_the_budget(checkpoints: Callable[..., Path]) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with load(checkpoints("olmoe")) as engine:
        reply(engine)
        assert engine.peak_device_bytes - before <= engine.plan.memory.budget
        assert engine.link.kind == "bus"


@pytest.mark.skipif(
    "expandable_segments:True" not in os.environ["PYTORCH_ALLOC_CONF"], reason="torch was told otherwise"
)
def test_slots_of_any_size_take_what_is_accounted_and_give_it_back() -> None:
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    arena = Arena(torch.device("cuda"), 1 << 30)
    for nbytes in (7 * MIB, 11 * MIB // 2, 9 * MIB + 4096):
        slots = [arena.allocate("cache", nbytes) for _ in range(50)]
        assert torch.cuda.memory_allocated() - allocated == arena.used_bytes == 50 * nbytes
        assert torch.cuda.memory_reserved() - reserved <= arena.used_bytes + 20 * MIB
        while slots:
            arena.free("cache", slots.pop())
        arena.trim()
    assert torch.cuda.memory_reserved() - reserved <= 20 * MIB


def test_expert_memory_is_page_locked(checkpoints: Callable[..., Path]) -> None:
    with load(checkpoints("olmoe")) as engine:
        assert not engine.notices
        reply(engine, 8)
        assert engine.residency.transfer.counters().unpinned_bytes == 0


def test_pageable_memory_serves_too_and_says_so(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(checkpoints("olmoe"), split=0.5) as engine:
        expected = reply(engine)
    monkeypatch.setattr("moepic_core.ram_store.pin", lambda records: Pinned(records, "the test is against it"))
    with load(checkpoints("olmoe"), split=0.5) as engine:
        engine.reconfigure(vram=engine.needs.smallest)
        assert reply(engine) == expected
        assert any("page-locked (the test is against it)" in notice for notice in engine.notices)
        assert engine.residency.transfer.counters().unpinned_bytes > 0


def test_stalls_are_those_of_the_device(checkpoints: Callable[..., Path]) -> None:
    with load(checkpoints("qwen3_moe"), strategy="on-demand") as engine:
        before_s = engine.residency.transfer.counters().stalled_s
        reply(engine)
        stalled_s = engine.residency.transfer.counters().stalled_s - before_s
        assert stalled_s > 0
        assert engine.snapshot().session.both.total.stall_s == pytest.approx(stalled_s)
