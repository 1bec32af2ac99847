"""Exactness: every family, split ratio, budget, strategy and link answers what Transformers' `eager` answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_checkpoints
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepic_core.engine import Engine
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings

NAMED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "qwen3_next")
OTHERS = tuple(family for family in tiny_checkpoints.FAMILIES if family not in NAMED)
PROMPT = [3 + (29 * place + place * place) % 300 for place in range(20)]
NEW_TOKENS = 48
TOLERANCE = 1e-5  # relative to the largest logit, float32


class Reference(NamedTuple):
    logits: Tensor  # [prompt, vocab]
    tokens: list[int]  # greedy continuation


@pytest.fixture(scope="module")
def references(checkpoints: Callable[..., Path]) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    @torch.inference_mode()
    def reference(family: str) -> Reference:
        if family not in made:
            model = AutoModelForCausalLM.from_pretrained(checkpoints(family), experts_implementation="eager").eval()
            output = model(torch.tensor([PROMPT]), use_cache=True)
            logits, tokens = output.logits[0], []
            for _ in range(NEW_TOKENS):
                tokens.append(int(output.logits[0, -1].argmax()))
                output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            made[family] = Reference(logits, tokens)
        return made[family]

    return reference


def load(folder: Path, tmp_path: Path, **settings: object) -> Engine:
    """Small chunks, so that a prompt takes several; room for prompt and reply."""
    fixed = {"device": "cpu", "context_length": 80, "prefill_chunk": 7, "packed_dir": str(tmp_path)}
    return Engine.load(Settings.create(checkpoint=str(folder), **{**fixed, **settings}))


def budgets(engine: Engine) -> Iterator[int]:
    """The smallest, one in the middle, everything."""
    smallest, everything = engine.needs.smallest, engine.needs.everything
    yield from (smallest, (smallest + everything) // 2, everything)


def assert_same(engine: Engine, reference: Reference) -> None:
    engine.hf.forget()
    engine.residency.begin_pass(len(PROMPT))
    logits = engine.hf.forward(PROMPT, all_logits=True)
    engine.residency.end_pass()
    error = float((logits - reference.logits).abs().max() / reference.logits.abs().max())
    mean = float((logits - reference.logits).abs().mean() / reference.logits.abs().max())
    assert error <= TOLERANCE, f"largest relative difference {error:.2e}, mean {mean:.2e}, allowed {TOLERANCE}"
    engine.hf.forget()
    done = list(engine.generate(PROMPT, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)))[-1]
    assert isinstance(done, Done)
    assert list(done.token_ids) == reference.tokens
    engine.check()
    assert engine.residency.arena.used_bytes <= engine.plan.memory.budget


@pytest.mark.parametrize("family", NAMED)
def test_every_split_budget_and_strategy(
    family: str, checkpoints: Callable[..., Path], references: Callable[[str], Reference], tmp_path: Path
) -> None:
    with load(checkpoints(family), tmp_path, link="emulated:20GB/s") as engine:
        for split in (0.0, 0.3, 0.5, 1.0):
            for vram in budgets(engine):
                engine.reconfigure(vram=vram, split=split)
                assert_same(engine, references(family))
        for strategy in STRATEGIES:
            for vram in budgets(engine):
                engine.reconfigure(vram=vram, split=None, strategy=strategy)
                assert_same(engine, references(family))


@pytest.mark.parametrize("family", NAMED)
def test_every_family_over_the_disk(
    family: str, checkpoints: Callable[..., Path], references: Callable[[str], Reference], tmp_path: Path
) -> None:
    with load(checkpoints(family), tmp_path, link="disk") as engine:
        for strategy, split, vram in zip(
            ("moepic", "moepic", "pregated"), (0.3, 1.0, None), budgets(engine), strict=True
        ):
            engine.reconfigure(vram=vram, split=split, strategy=strategy)
            assert_same(engine, references(family))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(
    family: str, checkpoints: Callable[..., Path], references: Callable[[str], Reference], tmp_path: Path
) -> None:
    with load(checkpoints(family), tmp_path, link="pcie4x16") as engine:
        engine.reconfigure(vram=(engine.needs.smallest + engine.needs.everything) // 2, split=0.3)
        assert_same(engine, references(family))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_float32_as_eager_is(
    dtype: str, family: str, checkpoints: Callable[..., Path], references: Callable[[str], Reference], tmp_path: Path
) -> None:
    exact = references(family).logits
    with torch.inference_mode():
        eager = (
            AutoModelForCausalLM.from_pretrained(
                checkpoints(family), dtype=getattr(torch, dtype), experts_implementation="eager"
            )
            .eval()(torch.tensor([PROMPT]))
            .logits[0]
            .float()
        )
    with load(checkpoints(family), tmp_path, link="pcie4x16", dtype=dtype, split=0.4) as engine:
        engine.residency.begin_pass(len(PROMPT))
        together = engine.hf.forward(PROMPT, all_logits=True)
        engine.hf.forget()
        one_by_one = []
        for token in PROMPT:
            engine.residency.begin_pass(1)
            one_by_one.append(engine.hf.forward([token]))
    for ours in (together, torch.stack(one_by_one)):
        assert float((ours.float() - exact).abs().mean()) <= 1.2 * float((eager - exact).abs().mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_identical_over_links_budgets_and_policies(
    dtype: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for link in ("disk", "emulated:50MB/s", "pcie5x16"):
        with load(checkpoints("olmoe"), tmp_path, link=link, dtype=dtype, split=0.5) as engine:
            for vram in budgets(engine):
                for eviction in ("lcp", "lru"):
                    engine.reconfigure(vram=vram, eviction=eviction)
                    engine.hf.forget()
                    engine.residency.begin_pass(len(PROMPT))
                    found.append(engine.hf.forward(PROMPT, all_logits=True))
                    for token in (5, 6, 7):
                        engine.residency.begin_pass(1)
                        found[-1] = torch.cat((found[-1], engine.hf.forward([token])[None]))
    assert all(torch.equal(logits, found[0]) for logits in found[1:])
