"""The nouns: settings are strict and frozen, strategies are complete, sizes add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moepic_core.errors import BadSettings
from moepic_core.spec import STRATEGIES, MachineProfile, MemoryPlan, ModelSpec, MoeLayer, Settings

LAYERS = (MoeLayer(1, 8, neurons=40, hidden=16, matrices=3, itemsize=2), MoeLayer(3, 4, 50, 16, 2, 2))
SPEC = ModelSpec(
    path="/models/tiny", name="tiny", model_type="tiny_moe", architecture="TinyMoe", dtype="bfloat16", num_layers=4,
    moe_layers=LAYERS, top_k=2, hidden=16, vocab_size=100, context_length=512, resident_bytes=1000,
    kv_bytes_per_token=8, num_parameters=1, active_parameters=1, file_bytes=1, shards=("a",), fingerprint="f",
)  # fmt: skip


def test_sizes_of_a_layer() -> None:
    layer = LAYERS[0]
    assert (layer.row_bytes, layer.expert_bytes, layer.layer_bytes) == (96, 3840, 30720)


def test_sizes_of_a_model() -> None:
    assert SPEC.expert_bytes == 30720 + 4 * 50 * 64
    assert SPEC.largest_layer_bytes == 30720
    assert SPEC.record_bytes_max == 3840


def test_a_memory_plan_adds_up() -> None:
    memory = MemoryPlan(resident=1, kv=20, workspace=300, staging=4000, cache=50000, budget=60000)
    assert (memory.used, memory.smallest) == (54321, 4321)


@pytest.mark.parametrize(
    "noun", [SPEC, LAYERS[0], Settings("x"), STRATEGIES["moepic"]], ids=lambda noun: type(noun).__name__
)
def test_nouns_are_frozen(noun: Any) -> None:
    name = dataclasses.fields(noun)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(noun, name, "other")


def test_what_was_not_measured_is_unknown() -> None:
    profile = MachineProfile("cpu", "CPU", 1, 1, 1, 1, 1)
    assert profile.link_bytes_per_s is profile.link_contended_bytes_per_s is profile.host_memory_bytes_per_s is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vrma": "2GB"}, r"unknown setting 'vrma', did you mean 'vram'\? Allowed: checkpoint, device"),
        ({"zzz": 1}, "unknown setting 'zzz'.* Allowed: checkpoint"),
        ({"strategy": "moepik"}, r"strategy 'moepik' is unknown, did you mean 'moepic'\? Allowed: moepic, mixtral-off"),
        ({"strategy": "Belady"}, "strategy 'Belady' is unknown"),
        ({"device": "cudo"}, r"device 'cudo' is unknown, did you mean 'cuda'\? Allowed: auto, cuda, cpu"),
        (
            {"eviction": "lcpp"},
            r"eviction 'lcpp' is unknown, did you mean 'lcp'\? Allowed: auto, lcp, lcp-aged, lru, lfu, req",
        ),
        ({"prefetch": "onn"}, r"prefetch 'onn' is unknown, did you mean 'on'\? Allowed: auto, on, off or a number"),
        ({"prefetch": -1}, r"prefetch -1 is out of range; allowed: auto, on, off or 0 experts and more"),
        ({"prefetch": True}, "prefetch True is out of range"),
        ({"dtype": "float8"}, r"dtype 'float8' is unknown, did you mean 'float32'\? Allowed: auto, float32"),
        ({"split": 1.01}, r"split ratio 1.01 is out of range; allowed is 0 \(nothing cached\) to 1 \(whole\)"),
        ({"split": -0.1}, "split ratio -0.1 is out of range"),
        ({"split": float("nan")}, "split ratio nan is out of range"),
        ({"prefill_chunk": 0}, "prefill_chunk 0 is too small; allowed is 1 token or more"),
        ({"context_length": 0}, "context_length 0 is too small; allowed is 1 token or more"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSettings, match=message):
        Settings.create(checkpoint="x", **values)
    with pytest.raises(BadSettings, match=message):
        Settings("x").replace(**values)


@pytest.mark.parametrize("split", [None, 0, 0.0, 0.5, 1, 1.0])
def test_good_splits_are_taken(split: float | None) -> None:
    assert Settings.create(checkpoint="x", split=split).split == split


def test_replacing_makes_a_new_object() -> None:
    old = Settings.create(checkpoint="x", vram="2GB")
    new = old.replace(split=0.5)
    assert (old.split, new.split, new.vram) == (None, 0.5, "2GB")


def test_strategies_are_named_after_themselves() -> None:
    assert {name: strategy.name for name, strategy in STRATEGIES.items()} == {name: name for name in STRATEGIES}
    assert set(STRATEGIES) >= {"moepic", "mixtral-offloading", "pregated", "on-demand"}
    assert len({dataclasses.astuple(strategy)[1:-1] for strategy in STRATEGIES.values()}) == len(STRATEGIES)
