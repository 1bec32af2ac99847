"""On a CUDA device: the same answers, the same books, and memory that stays under the budget. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepic_core.engine import Engine
from moepic_core.events import Done, TokenMade
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings

pytestmark = pytest.mark.gpu
PROMPT = [3 + (29 * place + place * place) % 300 for place in range(20)]


def load(folder: Path, **settings: object) -> Engine:
    return Engine.load(
        Settings.create(checkpoint=str(folder), device="cuda", context_length=96, prefill_chunk=7, **settings)
    )


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


def test_device_memory_stays_under_the_budget(checkpoints: Callable[..., Path]) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with load(checkpoints("olmoe")) as engine:
        list(engine.generate(PROMPT, Sampling(max_new_tokens=40, ignore_eos=True)))
        assert torch.cuda.max_memory_allocated() - before <= engine.plan.memory.budget
        assert engine.link.kind == "bus"


def test_expert_memory_is_page_locked(checkpoints: Callable[..., Path]) -> None:
    with load(checkpoints("olmoe")) as engine:
        assert not engine.notices
        list(engine.generate(PROMPT, Sampling(max_new_tokens=8, ignore_eos=True)))
        assert engine.residency.transfer.counters().unpinned_bytes == 0
