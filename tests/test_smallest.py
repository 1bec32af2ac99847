"""The smallest budget that a refusal names is enough: it is named from headers, and loading finds no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moepic_core.calibrate import probe
from moepic_core.checkpoint import read_spec
from moepic_core.engine import Engine
from moepic_core.errors import OutOfRoom
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.needs import needs_of
from moepic_core.spec import Settings

# Every layer keeps all; latent attention; sliding windows; routers in float32; linear attention, state spaces,
# convolutions.
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe", "qwen3_next", "nemotron_h", "lfm2_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_that_a_refusal_names_loads_and_answers(
    family: str, dtype: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(family, dtype)
    settings = Settings.create(checkpoint=str(folder), device="cpu", link="pcie4x16", context_length=256)
    with pytest.raises(OutOfRoom, match="the smallest is") as refused:
        Engine.load(settings.replace(vram="1kB"))
    named = re.search(r"\((\d+) bytes: ", str(refused.value))
    assert named is not None
    assert int(named[1]) == needs_of(settings, read_spec(folder), probe("cpu")).smallest
    with Engine.load(settings.replace(vram=f"{named[1]}B")) as engine:
        found = engine.needs
        assert found.smallest <= int(named[1]) <= 1.3 * found.smallest, (found, named[1])
        *_, done = engine.generate([5, 77, 191], Sampling(max_new_tokens=3, ignore_eos=True))
        assert isinstance(done, Done)
        assert len(done.token_ids) == 3
        assert engine.residency.arena.used_bytes <= int(named[1])
        engine.check()
