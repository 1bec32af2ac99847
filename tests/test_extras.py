"""What a checkpoint brings beside its weights: believed only as far as it fits, and never needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import make

from moepic_core.checkpoint import read_spec
from moepic_core.engine import Engine
from moepic_core.errors import BadCheckpoint
from moepic_core.extras import FILE, brought_routing, suggested_prompts
from moepic_core.routing import RoutingTrace
from moepic_core.spec import ModelSpec, Settings
from moepic_core.trace_file import save_trace


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return read_spec(make("mixtral", tmp_path / "model"))


def conversation(spec: ModelSpec, num_tokens: int = 64) -> RoutingTrace:
    """Every token uses the first experts of every layer."""
    layers = len(spec.moe_layers)
    experts = np.broadcast_to(np.arange(spec.top_k, dtype=np.int16), (num_tokens, layers, spec.top_k)).copy()
    nothing = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int16)
    num_experts = tuple(layer.num_experts for layer in spec.moe_layers)
    return RoutingTrace(experts, experts.copy(), num_experts, *nothing, ("",), "made up")


def bring(spec: ModelSpec, content: object) -> None:
    (Path(spec.path) / FILE).write_text(json.dumps(content))


def test_most_bring_nothing(spec: ModelSpec) -> None:
    assert suggested_prompts(Path(spec.path)) == () and brought_routing(spec) is None


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ({"suggested_prompts": ["a", "", 3, "b" * 999]}, ("a", "b" * 300)),
        ({"suggested_prompts": "abc", "routing": 7}, ()),
        (["suggested_prompts"], ()),
        ({"suggested_prompts": list("abcdefgh")}, tuple("abcdef")),
    ],
)
def test_only_texts_are_prompts(spec: ModelSpec, content: object, prompts: tuple[str, ...]) -> None:
    bring(spec, content)
    assert suggested_prompts(Path(spec.path)) == prompts
    assert brought_routing(spec) is None


def test_the_first_plan_and_the_first_cache_know_the_routing(spec: ModelSpec) -> None:
    save_trace(conversation(spec), Path(spec.path) / "routing.npz")
    bring(spec, {"routing": "routing.npz"})
    found = brought_routing(spec)
    assert found is not None and found.num_tokens == 64
    settings = Settings.create(checkpoint=spec.path, device="cpu", link="emulated:1GB/s", vram="50% of experts")
    with Engine.load(settings) as engine:
        known = engine.steering.trace()
        assert known is not None and known.num_tokens == 64
        for cached in engine.residency.where():  # before the first token
            assert cached[: engine.spec.top_k].all() if isinstance(cached, np.ndarray) else all(cached[: spec.top_k])
        engine.check()


def test_a_folder_that_was_copied_without_its_routing_says_nothing(spec: ModelSpec) -> None:
    bring(spec, {"routing": "../traces/left-behind.npz"})
    with Engine.load(Settings.create(checkpoint=spec.path, device="cpu", link="emulated:1GB/s")) as engine:
        assert (engine.steering.trace(), list(engine.notices)) == (None, [])


@pytest.mark.parametrize("damage", ["no trace", "other experts", "other top-k"])
def test_what_does_not_fit_is_said_and_not_used(spec: ModelSpec, damage: str) -> None:
    path = Path(spec.path) / "routing.npz"
    bring(spec, {"routing": path.name})
    if damage == "no trace":
        path.write_bytes(b"PK\x03\x04 but no more")
    elif damage == "other experts":
        other = conversation(spec)
        save_trace(replace(other, num_experts=(*other.num_experts[:-1], 31)), path)
    elif damage == "other top-k":
        other = conversation(spec)
        save_trace(replace(other, experts=other.experts[:, :, :1]), path)
    with pytest.raises(BadCheckpoint, match=r"routing\.npz"):
        brought_routing(spec)
    with Engine.load(Settings.create(checkpoint=spec.path, device="cpu", link="emulated:1GB/s")) as engine:
        assert any("is not used" in notice for notice in engine.notices)
        assert engine.steering.trace() is None
