"""One checkpoint, three dtypes: experts in bfloat16, attention in float16, the rest in float32, as some authors save.

Everything runs in the dtype that the config names; Transformers' `eager` on the same files is the reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import PROMPT, TOLERANCE, load
from transformers import AutoModelForCausalLM

from moepic_core.checkpoint import read_spec
from moepic_core.events import Done
from moepic_core.hf.text import Sampling

NEW_TOKENS = 16


def stored_as(name: str) -> torch.dtype:
    if ".experts." in name:
        return torch.bfloat16
    return torch.float16 if "attn" in name else torch.float32


@pytest.mark.parametrize("link", ["emulated:20GB/s", "disk"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_mixed_dtypes_answer_like_eager(
    family: str, link: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(checkpoints(family), folder)
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor.to(stored_as(name)) for name, tensor in tensors.items()}
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32, torch.float16, torch.bfloat16}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_spec(folder).dtype == "float32"
    with torch.inference_mode():
        eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        expected = eager(torch.tensor([PROMPT])).logits[0]
        tokens = eager.generate(
            torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(PROMPT) :].tolist()
    with load(folder, tmp_path, link=link, vram="50% of experts", split=0.4) as engine:
        engine.residency.begin_pass(len(PROMPT))
        logits = engine.hf.forward(PROMPT, all_logits=True)
        engine.residency.end_pass()
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE, f"largest relative difference {error:.2e}, allowed {TOLERANCE}"
        engine.hf.forget()
        *_, done = engine.generate(PROMPT, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        assert isinstance(done, Done)
        assert list(done.token_ids) == tokens
        engine.check()
